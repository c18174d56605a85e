"""The model of a folder whose `model_type` is `sdar` or `sdar_moe`: a Qwen3 that decodes blocks."""

from .configuration_sdar import SDARConfig, SDARMoeConfig
from .modeling_block_diffusion import Qwen3BlockDiffusionLM, Qwen3MoeBlockDiffusionLM

try:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:
    pass  # transformers 4 holds experts apart, as files do
else:  # later ones hold those of a layer in one tensor, and look up by model_type how to make it
    register_checkpoint_conversion_mapping("sdar_moe", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True)


class SDARForCausalLM(Qwen3BlockDiffusionLM):
    """Dense."""

    config_class = SDARConfig


class SDARMoeForCausalLM(Qwen3MoeBlockDiffusionLM):
    """A mixture of experts."""

    config_class = SDARMoeConfig
