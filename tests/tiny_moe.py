"""A Qwen3 with experts of a few thousand parameters, as a Hugging Face folder.

make_tiny_moe(folder)                                    # 2 layers of 4 experts, two for each token
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny_qwen3 import make_tokenizer


def make_tiny_moe(
    folder: Path,
    *,
    norm_topk_prob: bool = True,
    num_layers: int = 2,
    num_heads: int = 4,
    num_groups: int = 2,
    seed: int = 0,
) -> Path:
    """Weights drawn from `seed`; routers large enough for a token's probabilities to differ."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = make_tokenizer(folder)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=norm_topk_prob,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups,
        head_dim=12,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.2 * drawn)
    model.save_pretrained(folder)
    return folder
