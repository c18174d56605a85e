"""A trained student as something to use elsewhere: a Hugging Face folder that servers of block diffusion recognise."""

import megatron_opdlm.parallel  # noqa: F401  the CPU seam precedes any import of megatron.core
