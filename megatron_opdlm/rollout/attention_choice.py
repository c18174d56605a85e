"""Which kernel attends while the student decodes.

    build = choose_attention(config.rollout, model.config, device())      # logs what `auto` takes
    attention = build(longest)                                            # for sequences of up to so many tokens

`rollout.attention` names one of `REFUSALS`, which is honoured or refused, or `auto`, which takes the first that serves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from megatron.core.transformer import TransformerConfig

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.models.attention.backend import AttentionCase
from megatron_opdlm.rollout.flash_paged_attention import FlashPagedAttention, flash_refusal, load_kernel
from megatron_opdlm.rollout.kv_cache import PagedAttention
from megatron_opdlm.rollout.paged_attention import Heads, SdpaPagedAttention

logger = logging.getLogger(__name__)

BuildAttention = Callable[[int], PagedAttention]
"""Makes the attention of one rollout, whose longest sequence has so many tokens."""

REFUSALS: dict[str, Callable[[AttentionCase], str | None]] = {"flash": flash_refusal, "sdpa": lambda case: None}
"""Name of `rollout.attention` -> why it cannot serve a case, or None. `auto` tries them in this order."""


def choose_attention(rollout: RolloutConfig, model: TransformerConfig, device: torch.device) -> BuildAttention:
    """How to make the attention that `rollout.attention` asks for. ValueError: why it cannot serve."""
    case = attention_case(model, device)
    name = _first_that_serves(case) if rollout.attention == "auto" else rollout.attention
    if reason := REFUSALS[name](case):
        raise ValueError(f"rollout.attention {name}: {reason}")
    if name == "flash":
        kernel = load_kernel(case)
        logger.info("rollout.attention flash: %s, pages of %d tokens", kernel.source, kernel.page_size)
        return lambda longest: FlashPagedAttention(rollout.block_size, kernel, device)
    num_groups = model.num_query_groups // model.tensor_model_parallel_size
    heads = Heads(num_groups, model.num_attention_heads // model.num_query_groups)
    return lambda longest: SdpaPagedAttention(rollout.block_size, heads, longest, model.params_dtype, device)


def attention_case(model: TransformerConfig, device: torch.device) -> AttentionCase:
    """What decides whether a kernel serves."""
    return AttentionCase(
        device_type=device.type,
        compute_capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        dtype=model.params_dtype,
        head_dim=model.kv_channels,
    )


def _first_that_serves(case: AttentionCase) -> str:
    for name, refusal in REFUSALS.items():
        reason = refusal(case)
        if reason is None:
            logger.info("rollout.attention auto: %s", name)
            return name
        logger.info("rollout.attention auto: not %s: %s", name, reason)
    raise AssertionError("sdpa serves everything")
