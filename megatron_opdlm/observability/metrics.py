"""Weighted means of named values over micro-batches, optimizer steps and ranks.

metrics = MetricAccumulator()
metrics.add("train/loss", 2.0, weight=3)        # mean over 3 rows
metrics.add("train/loss", 4.0, weight=1)
metrics.add_sum("train/trained_tokens", 12)
metrics.values()                                # {"train/loss": 2.5, "train/trained_tokens": 12.0}
"""

from __future__ import annotations

from collections.abc import Iterable


class MetricAccumulator:
    """Sums of `weight * value` and of `weight` under each name; plain floats, so it travels between processes."""

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, float]] = {}
        self._sums: dict[str, float] = {}

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """Takes `value`, itself a mean over `weight` things, into the mean called `name`. Weight 0 leaves it alone."""
        assert name not in self._sums, f"{name} is a sum"
        if weight:
            total, weights = self._means.get(name, (0.0, 0.0))
            self._means[name] = (total + float(value) * weight, weights + weight)

    def add_sum(self, name: str, value: float) -> None:
        """Adds `value` to the sum called `name`."""
        assert name not in self._means, f"{name} is a mean"
        self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def merge(self, others: Iterable[MetricAccumulator]) -> None:
        """Takes in what others (of other ranks) have collected."""
        for other in others:
            for name, (total, weights) in other._means.items():
                self.add(name, total / weights, weights)
            for name, value in other._sums.items():
                self.add_sum(name, value)

    def values(self) -> dict[str, float]:
        """Each mean and each sum by its name, in alphabetical order. Names that never got a weight are absent."""
        means = {name: total / weights for name, (total, weights) in self._means.items()}
        return dict(sorted((means | self._sums).items()))
