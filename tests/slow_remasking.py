"""The remasking strategies, literally: one block, plain Python over lists.

    commits_slowly("sequential", [0.5, 0.5], [True, True], 1, False)      # {0}

It shares nothing with the package, and is the oracle of the strategies and of the decoder in `tests/references.py`.
"""

from __future__ import annotations


def commits_slowly(
    strategy: str,
    confidences: list[float],
    is_masked: list[bool],
    num_to_commit: int,
    is_last_step: bool,
    *,
    threshold: float = 1.0,
    entropies: list[float] | None = None,
    entropy_bound: float = 0.0,
) -> set[int]:
    """The positions that a denoising step commits, by the words of the method."""
    masked = [position for position in range(len(is_masked)) if is_masked[position]]
    if is_last_step or len(masked) < num_to_commit:
        return set(masked)
    if strategy == "sequential":
        return set(masked[:num_to_commit])
    if strategy == "entropy_bounded":
        return _within_bound(masked, entropies, entropy_bound)
    if strategy == "low_confidence_dynamic":
        above = [position for position in masked if confidences[position] > threshold]
        if len(above) >= num_to_commit:
            return set(above)
    return set(_most_confident(masked, confidences, num_to_commit))


def _most_confident(masked: list[int], confidences: list[float], num: int) -> list[int]:
    chosen, left = [], list(masked)
    for _ in range(num):
        best = left[0]
        for position in left:
            if confidences[position] > confidences[best]:
                best = position
        chosen.append(best)
        left.remove(best)
    return chosen


def _within_bound(masked: list[int], entropies: list[float], bound: float) -> set[int]:
    chosen, left, total = set(), list(masked), 0.0
    while left:
        least = left[0]
        for position in left:
            if entropies[position] < entropies[least]:
                least = position
        total += entropies[least]
        if chosen and total > bound:
            break
        chosen.add(least)
        left.remove(least)
    return chosen
