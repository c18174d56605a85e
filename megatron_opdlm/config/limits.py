"""Sizes that are no settings: the rollout keeps to them, and the planner counts with them."""

from __future__ import annotations

_FEWEST_POSITIONS = 256
_NUMBERS = 2**22


def drawn_together(num_rows: int) -> int:
    """Masked positions whose logits exist at one time, on a rank with so many rows of the output layer.

    >>> drawn_together(152_064), drawn_together(384)
    (256, 10922)
    """
    return max(_FEWEST_POSITIONS, _NUMBERS // num_rows)
