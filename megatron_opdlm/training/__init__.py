"""The training loop and its parts."""

import megatron_opdlm.parallel  # noqa: F401  the CPU seam precedes any import of megatron.core
