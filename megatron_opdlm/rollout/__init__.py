"""The student decodes its own denoising trajectories, in the process that trains it."""

import megatron_opdlm.parallel  # noqa: F401  the CPU seam precedes any import of megatron.core
