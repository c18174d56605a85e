"""Schedules over training steps: how long responses may be, and how sure the student has to be to commit a token.

    max_new_tokens_at(step, config.curricula, config.rollout)       # 100 -> 4000 over the first 100 steps
    domain_limit("code", limit, config.rollout)                     # at most the cap for code
    dynamic_threshold_at(step, config.curricula, config.rollout)    # 1.0 held, then down to 0.9

Short responses first keep the early student, which rambles, cheap (paper, Table 10). A threshold that starts high has
it write one token a step, as the teacher does, before it learns to write several. Both are functions of the step alone,
so a resumed run goes on where it was.
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


def dynamic_threshold_at(step: int, curricula: CurriculaConfig, rollout: RolloutConfig) -> float:
    """The confidence to commit a token at training step `step` (from 0).

    `threshold_start` for the first `threshold_hold_steps` steps, then `threshold_ramp_steps` more of a straight line to
    `rollout.dynamic_threshold`, which is reached at step hold + ramp.
    """
    start, end = curricula.threshold_start, rollout.dynamic_threshold
    since_hold = step - curricula.threshold_hold_steps
    if start is None:
        return end
    if since_hold < 0:
        return start
    ramp = curricula.threshold_ramp_steps
    return start + (end - start) * since_hold / ramp if since_hold < ramp else end


def domain_limit(domain: str, limit: int, rollout: RolloutConfig) -> int:
    """`limit`, or the domain's own cap if that is lower."""
    return min(limit, rollout.max_new_tokens_by_domain.get(domain, limit))


def _whole_blocks(num_tokens: float, block_size: int) -> int:
    # Rounded first: 8.000000000000002 tokens are two blocks of four, not three.
    return max(math.ceil(round(num_tokens / block_size, 9)), 1) * block_size
