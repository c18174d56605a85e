"""The teacher's targets and the divergence the student is trained on."""

import megatron_opdlm.parallel  # noqa: F401  the CPU seam precedes any import of megatron.core
