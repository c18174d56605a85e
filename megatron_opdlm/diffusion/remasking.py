"""Which masked positions a denoising step commits: the remasking strategies.

A denoising step has drawn a token at every masked position of a block and knows its confidence, the probability that
the raw softmax gave to that token. A strategy picks the positions whose tokens stay; the others are masked again. All
strategies are pure functions over a batch of blocks, whose rows may be at different steps.

Example: one block of four, the second position is already clean, and this step is to commit one position at least.

    >>> confidence_BK = torch.tensor([[0.95, 1.0, 0.5, 0.97]])
    >>> is_masked_BK = torch.tensor([[True, False, True, True]])
    >>> step = (confidence_BK, is_masked_BK, torch.tensor([1]), torch.tensor([False]))
    >>> select_commits("low_confidence_static", *step, dynamic_threshold=0.9).tolist()
    [[False, False, False, True]]
    >>> select_commits("low_confidence_dynamic", *step, dynamic_threshold=0.9).tolist()
    [[True, False, False, True]]
    >>> select_commits("sequential", *step, dynamic_threshold=0.9).tolist()
    [[True, False, False, False]]
    >>> entropies = dict(entropy_BK=torch.tensor([[0.25, 0.0, 0.5, 0.125]]), entropy_bound=0.375)
    >>> select_commits("entropy_bounded", *step, dynamic_threshold=0.9, **entropies).tolist()
    [[True, False, False, True]]

Legend: `B` sequences, one block of each; `K` positions of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Candidates:
    """What a strategy looks at: a batch of blocks after a denoising step has drawn its tokens.

    A strategy returns bool [B, K]; what it says of a position that is not masked does not count.
    """

    confidence_BK: torch.Tensor
    """float32 or float64, of the drawn tokens."""
    is_masked_BK: torch.Tensor
    """bool, the positions that may be committed."""
    num_to_commit_B: torch.Tensor
    """integer, n(s) of each row's own step. What it says of a row with fewer masked positions does not count."""
    dynamic_threshold: float
    entropy_BK: torch.Tensor | None
    """float32 or float64, of the distribution each token was drawn from."""
    entropy_bound: float


def select_commits(
    strategy: str,
    confidence_BK: torch.Tensor,
    is_masked_BK: torch.Tensor,
    num_to_commit_B: torch.Tensor,
    is_last_step_B: torch.Tensor,
    *,
    dynamic_threshold: float,
    entropy_BK: torch.Tensor | None = None,
    entropy_bound: float = 0.0,
) -> torch.Tensor:
    """The positions that this denoising step commits, bool [B, K]; never one that is not masked.

    Whatever the strategy, a row commits all of its masked positions if they are fewer than n(s), and at its last step.

    Args:
        strategy: a name in `REMASKING_STRATEGIES`.
        confidence_BK: float32 or float64. bfloat16 has no number between 0.8984 and 0.9023, so it would move the
            threshold. Ignored where not masked.
        is_masked_BK: bool, the positions that are still masked. A row without any commits nothing.
        num_to_commit_B: integer, n(s) of each row's own step (`blocks.commit_schedule`).
        is_last_step_B: bool, rows at their last allowed step. They commit everything left.
        dynamic_threshold: of `low_confidence_dynamic`; the confidence must be strictly above it.
        entropy_BK: of `entropy_bounded`, in nats. Ignored where not masked.
        entropy_bound: of `entropy_bounded`, in nats.

    Raises:
        ValueError: no such strategy.
    """
    if strategy not in REMASKING_STRATEGIES:
        raise ValueError(f"rollout.remasking_strategy ({strategy}) must be one of {', '.join(REMASKING_STRATEGIES)}")
    assert confidence_BK.dtype in (torch.float32, torch.float64), f"{confidence_BK.dtype} quantises the threshold"
    assert confidence_BK.shape == is_masked_BK.shape, "one confidence per position"
    candidates = Candidates(confidence_BK, is_masked_BK, num_to_commit_B, dynamic_threshold, entropy_BK, entropy_bound)
    commits_all_B = is_last_step_B | (is_masked_BK.sum(1) < num_to_commit_B)
    return is_masked_BK & (commits_all_B[:, None] | REMASKING_STRATEGIES[strategy](candidates))


def low_confidence_static(candidates: Candidates) -> torch.Tensor:
    """The n(s) most confident masked positions."""
    ranked_BK = candidates.confidence_BK.masked_fill(~candidates.is_masked_BK, float("-inf"))
    return _rank(ranked_BK, descending=True) < candidates.num_to_commit_B[:, None]


def low_confidence_dynamic(candidates: Candidates) -> torch.Tensor:
    """All masked positions above the threshold; the n(s) most confident where those are fewer.

    The union of the two sets is exactly this rule. With enough positions above the threshold, the most confident ones
    are among them and add nothing; with too few, they are themselves among the most confident.
    """
    return (candidates.confidence_BK > candidates.dynamic_threshold) | low_confidence_static(candidates)


def sequential(candidates: Candidates) -> torch.Tensor:
    """The first n(s) masked positions from the left."""
    return candidates.is_masked_BK.cumsum(1) <= candidates.num_to_commit_B[:, None]


def entropy_bounded(candidates: Candidates) -> torch.Tensor:
    """Masked positions by ascending entropy while the entropies add up to no more than the bound; one at least.

    The sum of the entropies bounds what is lost by drawing these tokens independently of each other (EB-sampler,
    arXiv 2505.24857). It is taken in float64, so that only float32 entropies themselves are rounded.
    """
    assert candidates.entropy_BK is not None, "entropy_bounded needs the entropies"
    ranked_BK = candidates.entropy_BK.double().masked_fill(~candidates.is_masked_BK, float("inf"))
    num_within_B1 = (ranked_BK.sort(dim=1).values.cumsum(1) <= candidates.entropy_bound).sum(1, keepdim=True)
    return _rank(ranked_BK) < num_within_B1.clamp(min=1)


def _rank(values_BK: torch.Tensor, descending: bool = False) -> torch.Tensor:
    """The place of each position, from 0, when a row is sorted; equal values keep the order of their positions."""
    # sorting the permutation inverts it
    return values_BK.argsort(dim=1, descending=descending, stable=True).argsort(dim=1)


REMASKING_STRATEGIES: dict[str, Callable[[Candidates], torch.Tensor]] = {
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": low_confidence_dynamic,
    "sequential": sequential,
    "entropy_bounded": entropy_bounded,
}
