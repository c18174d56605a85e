"""Who holds the others up is named: ranks that hang, and ranks that are merely slow."""

from __future__ import annotations

import re
import threading
import time

import pytest

from megatron_opdlm.observability.stragglers import STEPS, StragglerWatch
from megatron_opdlm.observability.watchdog import EXIT_CODE, Beat, Watchdog, describe


class DictStore:
    """What torch's stores do, within a process."""

    def __init__(self) -> None:
        self.values: dict[str, str | int] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def add(self, key: str, amount: int) -> int:
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]


class LostStore(DictStore):
    def set(self, *arguments) -> None:
        raise RuntimeError("connection closed")

    add = check = set


class SilentStore(DictStore):
    """On a machine that has vanished: what is sent there is lost, and no answer comes."""

    def add(self, *arguments) -> None:
        threading.Event().wait()


def watch(store, codes: list[int], progress=lambda: 0, num_ranks: int = 1) -> Watchdog:
    """Gives up after four tenths of a second."""
    arguments = {"limit_minutes": 0.5 / 60, "phase": lambda: "rollout", "progress": progress, "end": codes.append}
    return Watchdog(store, 0, num_ranks, **arguments)


def sleep_until(is_due, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_due() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("store", [DictStore(), LostStore(), SilentStore()])
def test_a_program_that_gets_nothing_done_is_ended(store, capsys):
    codes: list[int] = []
    with watch(store, codes):
        sleep_until(lambda: codes)
    assert codes == [EXIT_CODE]
    assert "error: no progress for" in (line := capsys.readouterr().err) and "in phase rollout" in line


@pytest.mark.parametrize("store", [DictStore(), LostStore()])
def test_the_message_says_where_it_stands(store, capsys):
    codes: list[int] = []
    with watch(store, codes):
        sleep_until(lambda: codes)
    assert "did not arrive: rank 0, in phase rollout at test_watchdog.py:" in capsys.readouterr().err


def test_a_store_that_does_not_answer_is_named(capsys):
    codes: list[int] = []
    with watch(SilentStore(), codes):
        sleep_until(lambda: codes)
    assert "the store at which the ranks met does not answer" in capsys.readouterr().err


def test_a_rank_whose_thread_is_silent_is_named(capsys):
    codes: list[int] = []
    store, is_through = DictStore(), threading.Event()
    store.set("beat/1", '{"number": 7, "phase": "teacher", "place": "x.py:1 f", "waits": true}')
    with watch(store, codes, num_ranks=3):
        while not codes:
            is_through.wait(0.01)
    told = capsys.readouterr().err
    assert "did not arrive: ranks 1-2, gone, or stopped from outside" in told
    assert re.search(r"waiting: rank 0, in phase rollout at threading.py:\d+ wait", told)


def test_a_program_that_goes_on_is_left_alone():
    codes: list[int] = []
    with watch(DictStore(), codes, progress=time.monotonic):
        sleep_until(lambda: codes, seconds=0.8)
    assert codes == []


def test_ranks_at_one_place_share_a_line():
    stands = {"phase": "rollout", "place": "engine.py:3 deal"}
    beats = {rank: Beat(number=1, waits=True, **stands) for rank in (0, 1, 2, 5)}
    beats[3] = Beat(number=1, phase="rollout", place="socket.py:9 read", waits=False)
    assert describe(beats, 6).splitlines() == [
        "  did not arrive: rank 4, gone, or stopped from outside",
        "  did not arrive: rank 3, in phase rollout at socket.py:9 read",
        "  waiting: ranks 0-2, 5, in phase rollout at engine.py:3 deal",
    ]


def test_ranks_that_all_wait_are_told_so():
    beats = {rank: Beat(1, "student", f"x.py:{rank} f", True) for rank in range(2)}
    assert describe(beats, 2).splitlines()[-1] == "  all ranks wait, so they wait for different things"


def test_a_rank_that_is_slow_for_several_steps_is_named_once(caplog):
    watch, step = StragglerWatch(), [{"teacher": 1.0}, {"teacher": 1.0}, {"teacher": 3.0}]
    assert watch.metrics(step) == {"perf/seconds_teacher_over_median": 3.0}
    for _ in range(STEPS - 2):
        watch.metrics(step)
    assert not caplog.messages
    for _ in range(STEPS):
        watch.metrics(step)
    (message,) = caplog.messages
    assert message.startswith("rank 2 holds up phase teacher: 3.0 times the median of 3 ranks")


def test_ranks_that_are_slow_by_turns_are_not_named(caplog):
    watch = StragglerWatch()
    for step in range(4 * STEPS):
        watch.metrics([{"rollout": 3.0 if step % 3 == rank else 1.0} for rank in range(3)])
    assert not caplog.messages


def test_a_rank_alone_holds_nobody_up():
    assert StragglerWatch().metrics([{"rollout": 3.0}]) == {}
