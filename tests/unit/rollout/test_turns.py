"""Work that takes turns."""

from __future__ import annotations

from megatron_opdlm.rollout.turns import take_turns


def steps(name: str, count: int, seen: list[str]):
    for number in range(count):
        seen.append(f"{name}{number}")
        yield


def composed(seen: list[str]):
    yield from steps("x", 2, seen)
    seen.append("end")


def test_each_piece_goes_on_to_its_next_yield_in_the_order_of_the_first_round():
    seen: list[str] = []
    take_turns([steps("a", 3, seen), steps("b", 1, seen), steps("c", 2, seen)])
    assert seen == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_a_composed_piece_runs_to_its_end():
    seen: list[str] = []
    take_turns([composed(seen), steps("y", 1, seen)])
    assert seen == ["x0", "y0", "x1", "end"]


def test_no_work_is_done_at_once():
    take_turns([])
