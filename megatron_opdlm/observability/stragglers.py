"""Which rank holds the others up, phase by phase.

    watch = StragglerWatch()
    watch.metrics([{"rollout": 2.0, "teacher": 1.0}, {"rollout": 2.0, "teacher": 3.0}])
    # {"perf/seconds_rollout_over_median": 1.0, "perf/seconds_teacher_over_median": 1.5}: of the slowest rank

A phase in which all ranks wait for each other takes all of them equally long, whoever is slow. What tells are phases
in which a rank is on its own: `rollout` without the time after its last sequence, and `teacher`, which runs before
data-parallel ranks meet. A rank that is the slowest of a phase by half for several steps in a row is named in the log.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence

logger = logging.getLogger(__name__)

RATIO = 1.5
"""Times the median of all ranks that makes a straggler of the slowest."""
STEPS = 5
"""In a row, before it is told."""
SHORTEST = 0.1
"""Seconds that the slowest must take at least: what is shorter is noise."""


class StragglerWatch:
    """Remembers who was the slowest, phase by phase."""

    def __init__(self) -> None:
        self._suspects: dict[str, tuple[int, int]] = {}
        """Phase -> rank and its steps in a row."""

    def metrics(self, seconds_by_rank: Sequence[dict[str, float]]) -> dict[str, float]:
        """The slowest rank's time over the median of all, for each phase that all have, from a step's seconds of each.

        A rank alone has no figure.
        """
        if len(seconds_by_rank) == 1:
            return {}
        phases = [phase for phase in seconds_by_rank[0] if all(phase in seconds for seconds in seconds_by_rank)]
        return {
            f"perf/seconds_{phase}_over_median": self._ratio(phase, [seconds[phase] for seconds in seconds_by_rank])
            for phase in phases
        }

    def _ratio(self, phase: str, seconds: list[float]) -> float:
        slowest, median = max(seconds), statistics.median(seconds)
        rank, ratio = seconds.index(slowest), slowest / max(median, 1e-9)
        if ratio < RATIO or slowest < SHORTEST:
            self._suspects.pop(phase, None)
            return ratio
        suspect, num_steps = self._suspects.get(phase, (rank, 0))
        self._suspects[phase] = (rank, num_steps + 1 if suspect == rank else 1)
        if self._suspects[phase][1] == STEPS:
            message = "rank %d holds up phase %s: %.1f times the median of %d ranks (perf/seconds_%s_over_median)"
            logger.warning(message, rank, phase, ratio, len(seconds), phase)
        return ratio
