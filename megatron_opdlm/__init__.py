"""On-policy distillation of an autoregressive Qwen3 into a block-diffusion language model, on Megatron-Core."""

__version__ = "0.1.0"
