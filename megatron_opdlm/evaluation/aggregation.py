"""From the scores of single responses to those of a task: mean, pass@k, majority.

scores = [[1, 0, 1], [0, 0, 0]]                 # two documents, three responses each
mean_and_error(scores)                          # (1/3, 1/3)
pass_at_k(scores, 2)                            # (1 + 0) / 2
majority([["7", "8", "7"], [None, "1", "2"]], scores)
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

Scores = Sequence[Sequence[float]]
"""Per document, the score of each response."""


def mean_and_error(scores: Scores) -> tuple[float, float | None]:
    """The mean over documents of their responses' mean, and its standard error; None for a single document."""
    means = [statistics.fmean(row) for row in scores]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return statistics.fmean(means), error


def are_right_or_wrong(scores: Scores) -> bool:
    """Whether every score is 0 or 1, so that it makes sense to speak of right responses."""
    return all(score in (0, 1) for row in scores for score in row)


def pass_at_k(scores: Scores, k: int) -> float:
    """The chance that k of a document's responses, drawn without putting back, have a right one; mean over documents.

    Of n responses, c of them right, 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv 2107.03374, Eq. 1).
    """
    chances = []
    for row in scores:
        n, num_right = len(row), sum(row)
        assert k <= n, f"{k} of {n} responses cannot be drawn"
        chances.append(1 - math.comb(n - int(num_right), k) / math.comb(n, k))
    return statistics.fmean(chances)


def ks(num_responses: int) -> list[int]:
    """The k that pass@k is stated for: powers of two from 2, and all responses."""
    powers = [2**power for power in range(1, num_responses.bit_length()) if 2**power < num_responses]
    return [*powers, num_responses] if num_responses > 1 else []


def majority(answers: Sequence[Sequence[str | None]], scores: Scores) -> float:
    """The mean score of each document's most frequent answer, of those as frequent the one that came first.

    Responses without an answer have no vote; a document without any answer has the score of its first response.
    """
    return statistics.fmean(row[_winner(row_answers)] for row_answers, row in zip(answers, scores, strict=True))


def _winner(answers: Sequence[str | None]) -> int:
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(votes.most_common(1)[0][0]) if votes else 0
