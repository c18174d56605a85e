"""Ends a run in which a rank hangs, with a message that says which one, and in which phase.

    with Watchdog(store, rank, num_ranks, limit_minutes=10, phase=lambda: "rollout", progress=lambda: forwards):
        train()

A thread beside each rank's program looks at what that has got done (`progress`, anything that changes) and tells the
others through the store that the ranks met at, which answers also while collectives hang. If nothing changes for four
fifths of the limit, which is before the collectives themselves would give up, the run ends. The first rank to find that
says what all of them are doing:

    no progress for 480 s in phase rollout (parallel.distributed_timeout_minutes is 10)
      did not arrive: rank 3, in phase rollout at engine.py:112 generate_some, then at socket.py:705 readinto
      waiting: ranks 0-2, in phase rollout at work_queue.py:46 deal, then at distributed_c10d.py:4151 all_gather

A rank waits if its program stands in a call of torch.distributed or one that waits for a result; it did not arrive if
it stands elsewhere, or if its own thread says nothing. On GPUs, where this has not been run yet, a program also stands
in calls that wait for its own device. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import linecache
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

EXIT_CODE = 3
"""Of every process of a run that ends here."""
EARLIER = 0.8
"""Part of the limit after which a rank is given up: collectives raise errors of their own at the limit."""
LONGEST_INTERVAL = 5.0
"""Seconds between two looks, where the limit is not short."""
PATIENCE = 20
"""Intervals that a rank waits for its store at the end. Its report takes three, and eight if another rank has it."""
_WAITS = re.compile(r"\.(wait|synchronize|cpu|item|tolist)\(")
"""In a line of source: the program stands there until a device or another rank is through."""


class Store(Protocol):
    """What the ranks write each other notes with; torch's stores are of this kind."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, amount: int) -> int: ...


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int
    """Counts up as long as the rank's thread lives."""
    phase: str
    place: str
    """Where its program stands."""
    waits: bool
    """Whether it waits there for something."""


class Watchdog:
    """Watches this rank's main thread while a `with` block lasts. Every rank must have one."""

    def __init__(
        self,
        store: Store,
        rank: int,
        num_ranks: int,
        *,
        limit_minutes: float,
        phase: Callable[[], str],
        progress: Callable[[], object],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._store, self._rank, self._num_ranks = store, rank, num_ranks
        self._limit_minutes, self._phase, self._progress, self._end = limit_minutes, phase, progress, end
        self._limit = EARLIER * 60 * limit_minutes
        self._interval = min(LONGEST_INTERVAL, self._limit / 40)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._num_beats = 0

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join(PATIENCE * self._interval)

    def _watch(self) -> None:
        seen, since = self._progress(), time.monotonic()
        while not self._is_over.wait(self._interval):
            if (got := self._progress()) != seen:
                seen, since = got, time.monotonic()
            self._say()
            if time.monotonic() - since > self._limit:
                return self._give_up(time.monotonic() - since)

    def _give_up(self, seconds: float) -> None:
        """One rank reports. The others stay for as long as it takes to ask them."""
        # A store whose machine has vanished lets those who ask it wait without end.
        report = threading.Thread(target=self._report, args=(seconds,), name="report", daemon=True)
        report.start()
        report.join(PATIENCE * self._interval)
        if report.is_alive():
            self._print(seconds, "  the store at which the ranks met does not answer")
        if not self._is_over.is_set():
            self._end(EXIT_CODE)

    def _report(self, seconds: float) -> None:
        if self._is_first():
            before = self._beats()
            self._stay(3)
            beats = {rank: beat for rank, beat in self._beats().items() if before.get(rank) != beat}
            self._print(seconds, describe(beats | {self._rank: self._own_beat()}, self._num_ranks))
        else:
            self._stay(8)

    def _print(self, seconds: float, found: str) -> None:
        head = f"no progress for {seconds:.0f} s in phase {self._phase()} (parallel.distributed_timeout_minutes is "
        text = f"{head}{self._limit_minutes:g})\n{found}"
        print(f"[rank {self._rank}] error: {text}", file=sys.stderr, flush=True)

    def _stay(self, num_intervals: int) -> None:
        for _ in range(num_intervals):
            self._is_over.wait(self._interval)
            self._say()

    def _say(self) -> None:
        self._num_beats += 1
        try:
            self._store.set(f"beat/{self._rank}", json.dumps(dataclasses.asdict(self._own_beat())))
        except RuntimeError:
            return  # whoever kept the store is gone; the limit holds all the same

    def _own_beat(self) -> Beat:
        return Beat(self._num_beats, self._phase(), *_standing_place())

    def _is_first(self) -> bool:
        try:
            return self._store.add("reports", 1) == 1
        except RuntimeError:
            return True

    def _beats(self) -> dict[int, Beat]:
        """The latest of each rank that has said something."""
        try:
            keys = {rank: f"beat/{rank}" for rank in range(self._num_ranks)}
            return {
                rank: Beat(**json.loads(self._store.get(key))) for rank, key in keys.items() if self._store.check([key])
            }
        except RuntimeError:
            return {}


def describe(beats: dict[int, Beat], num_ranks: int) -> str:
    """Who did not arrive, and who waits; ranks that stand at one place share a line.

    Ranks without a beat are those whose threads say nothing.
    """
    places: dict[tuple[bool, str], list[int]] = {}
    for rank in range(num_ranks):
        beat = beats.get(rank)
        words = "gone, or stopped from outside" if beat is None else f"in phase {beat.phase} at {beat.place}"
        places.setdefault((beat is not None and beat.waits, words), []).append(rank)
    lines = [
        f"  {'waiting' if waits else 'did not arrive'}: {_named(ranks)}, {words}"
        for (waits, words), ranks in sorted(places.items())
    ]
    if all(waits for waits, _ in places):
        lines.append("  all ranks wait, so they wait for different things")
    return "\n".join(lines)


def _named(ranks: Iterable[int]) -> str:
    """`ranks 0-2, 5`; ascending numbers."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    number = "rank " if len(spans) == 1 and len(spans[0]) == 1 else "ranks "
    return number + ", ".join("-".join(map(str, span)) for span in spans)


def _standing_place() -> tuple[str, bool]:
    """Where the main thread stands, in this project and below it, and whether it waits there."""
    innermost = sys._current_frames()[threading.main_thread().ident]
    own = innermost
    while own is not None and not own.f_globals.get("__name__", "").startswith("megatron_opdlm"):
        own = own.f_back
    frames = [frame for frame in dict.fromkeys((own, innermost)) if frame is not None]
    return ", then at ".join(map(_written, frames)), _is_waiting(innermost)


def _written(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def _is_waiting(frame: FrameType) -> bool:
    """In torch.distributed, in a lock of Python's, or in a line that asks for what is not there yet."""
    if frame.f_globals.get("__name__", "").startswith("torch.distributed") or frame.f_code.co_name == "wait":
        return True
    return bool(_WAITS.search(linecache.getline(frame.f_code.co_filename, frame.f_lineno)))
