"""Warns when the responses go to pieces: they shrink, repeat themselves, do not end, or leave nothing to chance.

    watch = CollapseWatch(read_records("metrics.jsonl"))      # of the steps before a restart
    watch.write(20, {"rollout/repetition_rate": 0.7})
    # collapse watch, step 20: rollout/repetition_rate is 0.62, over 0.5: responses repeat themselves

A writer of metrics, which looks at means over about five steps. Each warning comes once, and again when the metric has
been well in between. It changes nothing in the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

logger = logging.getLogger(__name__)

MEMORY = 0.8
"""Weight of the past in the mean, for each step."""
FIRST_STEPS = 5
"""Nothing is said before the mean has so many."""


@dataclass(frozen=True)
class Bound:
    """When a metric's mean is bad."""

    meaning: str
    highest: float = math.inf
    lowest: float = -math.inf
    lowest_of_best: float = 0.0
    """The lowest as a part of the highest mean so far."""

    def broken_by(self, mean: float, best: float) -> str | None:
        """What is wrong, or None."""
        lowest = max(self.lowest, self.lowest_of_best * best)
        if mean > self.highest:
            return f"over {self.highest:g}"
        return f"below {lowest:g}" if mean < lowest else None


BOUNDS = {
    "rollout/response_length": Bound("responses get ever shorter", lowest_of_best=0.1),
    "rollout/repetition_rate": Bound("responses repeat themselves", highest=0.5),
    "rollout/end_token_fraction": Bound("fewer and fewer responses end by themselves", lowest_of_best=0.5),
    "train/student_entropy": Bound("the student leaves nothing to chance", lowest=0.01),
}
"""Metric -> its bound. Entropies are in nats per trained position."""


class CollapseWatch:
    """Follows the metrics of `BOUNDS`. `records` are those of earlier steps, of which nothing is said again."""

    def __init__(self, records: Iterable[Mapping[str, float | None]] = ()) -> None:
        self._means: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._num_steps: dict[str, int] = {}
        self._is_told: set[str] = set()
        for record in records:
            self.follow(record)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in a step's metrics and warns of what has gone bad with it."""
        for message in self.follow(metrics):
            logger.warning("collapse watch, step %d: %s", step, message)

    def close(self) -> None:
        """Nothing is left to do."""

    def follow(self, metrics: Mapping[str, float | None]) -> list[str]:
        """Takes in a step's metrics, and returns what has gone bad with it."""
        messages = (self._judge(name, bound, metrics.get(name)) for name, bound in BOUNDS.items())
        return [message for message in messages if message]

    def _judge(self, name: str, bound: Bound, value: float | None) -> str | None:
        if value is None or not math.isfinite(value):
            return None
        mean = MEMORY * self._means.get(name, value) + (1 - MEMORY) * value
        self._means[name], self._num_steps[name] = mean, self._num_steps.get(name, 0) + 1
        self._best[name] = max(mean, self._best.get(name, mean))
        reason = bound.broken_by(mean, self._best[name]) if self._num_steps[name] >= FIRST_STEPS else None
        if reason is None:
            self._is_told.discard(name)
            return None
        if name in self._is_told:
            return None
        self._is_told.add(name)
        return f"{name} is {mean:.3g}, {reason}: {bound.meaning}"
