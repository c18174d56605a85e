"""Schedules over training steps: how long responses may be.

    max_new_tokens_at(step, config.curricula, config.rollout)       # 100 -> 4000 over the first 100 steps
    domain_limit("code", limit, config.rollout)                     # at most the cap for code

Short responses first keep the early student, which rambles, cheap (paper, Table 10).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_opdlm.config.schema import CurriculaConfig, RolloutConfig

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "sine": lambda progress: math.sin(math.pi * progress / 2),
    "cosine": lambda progress: 1 - math.cos(math.pi * progress / 2),
}
"""Progress through the ramp, 0 to 1 -> share of the way from the first to the full length."""


def max_new_tokens_at(step: int, curricula: CurriculaConfig, rollout: RolloutConfig) -> int:
    """Longest response at training step `step` (from 0), in tokens: whole blocks, at least one.

    `start + (end - start) * shape(min(step / ramp, 1))`, rounded up to the block grid, never above
    `rollout.max_new_tokens` rounded up likewise.
    """
    end = _whole_blocks(rollout.max_new_tokens, rollout.block_size)
    if curricula.length_start is None:
        return end
    ramp = curricula.length_ramp_steps
    share = SHAPES[curricula.length_shape](min(step / ramp, 1.0) if ramp else 1.0)
    length = curricula.length_start + (rollout.max_new_tokens - curricula.length_start) * share
    return min(_whole_blocks(length, rollout.block_size), end)


def domain_limit(domain: str, limit: int, rollout: RolloutConfig) -> int:
    """`limit`, or the domain's own cap if that is lower."""
    return min(limit, rollout.max_new_tokens_by_domain.get(domain, limit))


def _whole_blocks(num_tokens: float, block_size: int) -> int:
    # Rounded first: 8.000000000000002 tokens are two blocks of four, not three.
    return max(math.ceil(round(num_tokens / block_size, 9)), 1) * block_size
