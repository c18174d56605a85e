"""Seconds per phase of a training step.

timers = PhaseTimers(synchronize=torch.cuda.synchronize)
with timers.phase("rollout"):
    ...
timers.seconds()                                # {"rollout": 1.25}
timers.reset()
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class PhaseTimers:
    """Adds up the wall-clock time of each named phase; entering a phase again adds to it.

    A GPU runs behind the program, so `synchronize` waits for it at both ends of a phase. `clock` returns seconds.
    """

    def __init__(
        self, synchronize: Callable[[], object] = lambda: None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self.num_marks = 0
        """Times that a phase has begun or ended: a sign of life."""

    @property
    def current(self) -> str:
        """The phase that the program is in, the innermost one. Other threads may ask while it changes."""
        return next(iter(self._open[-1:]), "between steps")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the `with` block to `name`, also if it ends in an error."""
        self._synchronize()
        started = self._clock()
        self._open.append(name)
        self.num_marks += 1
        try:
            yield
        finally:
            self._synchronize()
            self._open.pop()
            self.num_marks += 1
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - started

    def seconds(self) -> dict[str, float]:
        """Seconds per phase since the last reset."""
        return dict(self._seconds)

    def reset(self) -> None:
        """Sets all phases to nothing."""
        self._seconds.clear()
