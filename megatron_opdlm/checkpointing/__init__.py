"""Weights and training state on disk: Hugging Face folders and Megatron distributed checkpoints."""

import megatron_opdlm.parallel  # noqa: F401  the CPU seam precedes any import of megatron.core
