"""The config of a Qwen3 that decodes blocks, under the names that servers know SDAR by; the keys are Qwen3's.

`mask_token_id`, `block_size` and `logit_shift` are attributes besides, as in config.json. So is `rope_theta`, where
transformers 4 has it: from release 5 on it is in `rope_parameters` alone, and SGLang, which does not look there, would
take its default.
"""

from transformers import Qwen3Config, Qwen3MoeConfig


class SDARConfig(Qwen3Config):
    """Of a dense model."""

    model_type = "sdar"

    def __init__(self, **values):
        super().__init__(**values)
        if not hasattr(self, "rope_theta"):
            self.rope_theta = self.rope_parameters["rope_theta"]


class SDARMoeConfig(Qwen3MoeConfig):
    """Of a mixture of experts."""

    model_type = "sdar_moe"

    def __init__(self, **values):
        super().__init__(**values)
        if not hasattr(self, "rope_theta"):
            self.rope_theta = self.rope_parameters["rope_theta"]
