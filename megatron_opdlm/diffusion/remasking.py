"""Which masked positions a denoising step commits: the remasking strategies.

A denoising step has drawn a token at every masked position of a block and knows its confidence, the probability that
the raw softmax gave to that token. A strategy picks the positions whose tokens stay; the others are masked again. All
strategies are pure functions over a batch of blocks, whose rows may be at different steps.

Example: one block of four, the second position is already clean, and this step is to commit one position at least.

    >>> confidence_BK = torch.tensor([[0.95, 1.0, 0.5, 0.97]])
    >>> is_masked_BK = torch.tensor([[True, False, True, True]])
    >>> step = dict(num_to_commit_B=torch.tensor([1]), dynamic_threshold=0.9, is_last_step_B=torch.tensor([False]))
    >>> select_commits("low_confidence_static", confidence_BK, is_masked_BK, **step).tolist()
    [[False, False, False, True]]
    >>> select_commits("low_confidence_dynamic", confidence_BK, is_masked_BK, **step).tolist()
    [[True, False, False, True]]

Legend: `B` sequences, one block of each; `K` positions of a block.
"""

from __future__ import annotations

import torch


def select_commits(
    strategy: str,
    confidence_BK: torch.Tensor,
    is_masked_BK: torch.Tensor,
    num_to_commit_B: torch.Tensor,
    dynamic_threshold: float,
    is_last_step_B: torch.Tensor,
) -> torch.Tensor:
    """The positions that this denoising step commits, bool [B, K]; never one that is not masked.

    Args:
        strategy: a name in `REMASKING_STRATEGIES`.
        confidence_BK: float32 or float64. bfloat16 has no number between 0.8984 and 0.9023, so it would move the
            threshold. Ignored where not masked.
        is_masked_BK: bool, the positions that are still masked. A row without any commits nothing.
        num_to_commit_B: integer, n(s) of each row's own step (`blocks.commit_schedule`). A row with fewer masked
            positions commits all of them. Ties in confidence go to the lower position.
        dynamic_threshold: of `low_confidence_dynamic`; the confidence must be strictly above it.
        is_last_step_B: bool, rows at their last allowed step. They commit everything left.

    Raises:
        ValueError: no such strategy.
    """
    if strategy not in REMASKING_STRATEGIES:
        raise ValueError(f"rollout.remasking_strategy ({strategy}) must be one of {', '.join(REMASKING_STRATEGIES)}")
    assert confidence_BK.dtype in (torch.float32, torch.float64), f"{confidence_BK.dtype} quantises the threshold"
    assert confidence_BK.shape == is_masked_BK.shape, "one confidence per position"
    block_size = confidence_BK.shape[1]
    num_to_commit_B1 = torch.where(is_last_step_B, block_size, num_to_commit_B)[:, None]
    return REMASKING_STRATEGIES[strategy](confidence_BK, is_masked_BK, num_to_commit_B1, dynamic_threshold)


def low_confidence_static(
    confidence_BK: torch.Tensor, is_masked_BK: torch.Tensor, num_to_commit_B1: torch.Tensor, dynamic_threshold: float
) -> torch.Tensor:
    """The `num_to_commit_B1` most confident masked positions, or all of them where fewer are masked."""
    # Positions that are not masked rank last, and a rank below the count may still be one of theirs: hence the `&`.
    ranked_BK = confidence_BK.masked_fill(~is_masked_BK, float("-inf"))
    # A stable sort keeps equal confidences in the order of their positions; sorting the permutation inverts it.
    rank_BK = ranked_BK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank_BK < num_to_commit_B1) & is_masked_BK


def low_confidence_dynamic(
    confidence_BK: torch.Tensor, is_masked_BK: torch.Tensor, num_to_commit_B1: torch.Tensor, dynamic_threshold: float
) -> torch.Tensor:
    """All masked positions above the threshold; the `num_to_commit_B1` most confident where those are fewer.

    The union of the two sets is exactly this rule. With enough positions above the threshold, the most confident ones
    are among them and add nothing; with too few, they are themselves among the most confident.
    """
    is_above_BK = is_masked_BK & (confidence_BK > dynamic_threshold)
    return is_above_BK | low_confidence_static(confidence_BK, is_masked_BK, num_to_commit_B1, dynamic_threshold)


REMASKING_STRATEGIES = {
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": low_confidence_dynamic,
}
