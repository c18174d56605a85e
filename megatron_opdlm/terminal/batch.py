"""Answers to a list of prompts, decoded together and shown in the order of the prompts.

    answer_all(student, screen, prompts, record=print)

An answer is shown as soon as it and all before it are there; those that other data-parallel ranks have decoded, at the
end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.terminal.answers import Answer, Cost
from megatron_opdlm.terminal.screens import PlainScreen
from megatron_opdlm.terminal.student import Student


def answer_all(
    student: Student, screen: PlainScreen, prompts: Sequence[Prompt], record: Callable[[Answer], None]
) -> None:
    """`rollout.num_responses_per_prompt` answers to each; `record` is given each of them. Rank 0 calls it."""
    number = student.rollout.num_responses_per_prompt
    repeated = [prompt for prompt in prompts for _ in range(number)]

    def show(place: int, trajectory: Trajectory) -> None:
        answer = Answer.of(trajectory, student.tokenizer)
        screen.show(trajectory, answer, title=_title(place, len(repeated), number))
        record(answer)

    in_order = _InOrder(show)
    started = time.perf_counter()
    with screen.watching(repeated):
        on_step = screen.on_step if screen.is_live else None
        trajectories = student.answer(prompts, 0, on_finished=in_order.add, on_step=on_step)
    seconds = time.perf_counter() - started
    for place, trajectory in enumerate(trajectories):
        in_order.add(place, trajectory)
    tokens, steps = (sum(getattr(t, name) for t in trajectories) for name in ("response_length", "num_steps"))
    screen.note(Cost(tokens, steps, seconds).line())


class _InOrder:
    """Hands on what comes in any order, and may come twice, by its place: 0, 1, 2 and so on."""

    def __init__(self, hand_on: Callable[[int, Trajectory], None]) -> None:
        self._hand_on, self._next = hand_on, 0
        self._held: dict[int, Trajectory] = {}

    def add(self, place: int, trajectory: Trajectory) -> None:
        """One of them."""
        if place >= self._next:
            self._held[place] = trajectory
        while self._next in self._held:
            self._hand_on(self._next, self._held.pop(self._next))
            self._next += 1


def _title(place: int, num_answers: int, num_each: int) -> str:
    """Nothing over a single answer."""
    if num_answers == 1:
        return ""
    prompt, sample = divmod(place, num_each)
    return f"--- {prompt + 1} ---" if num_each == 1 else f"--- {prompt + 1}, answer {sample + 1} ---"
