"""Student and teacher as Megatron GPTModels built from one Hugging Face Qwen3 config."""

import megatron_opdlm.parallel  # noqa: F401  the CPU seam precedes any import of megatron.core
