"""Where answers go: as text, as JSON, or to a terminal that shows them while they are made.

screen = build_screen(as_json=False, show_steps=False, student=student)
with screen.watching(prompts):
    student.answer(prompts, turn=0, on_step=screen.on_step)
screen.show(trajectory, answer)
screen.note("48 tokens in 0.5 s")           # to stderr: the answers alone are on stdout
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.rollout.denoising_step import DenoisingStep
from megatron_opdlm.terminal.answers import Answer, step_lines

if TYPE_CHECKING:
    from megatron_opdlm.terminal.student import Student

_VISIBLE_CONTROLS = (
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    | {127: "\u2421"}
    | dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}")  # of which xterm takes U+009B for ESC [
)


class PlainScreen:
    """Text, for files, pipes and terminals without colours."""

    is_live = False

    def __init__(self, student: Student, show_steps: bool) -> None:
        self.student, self.tokenizer, self.show_steps = student, student.tokenizer, show_steps

    def loading(self, folder: str) -> AbstractContextManager:
        """While the weights of this folder are read."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def watching(self, prompts: Sequence[Prompt]) -> Iterator[None]:
        """While these are answered; a prompt for each answer."""
        yield

    def on_step(self, step: DenoisingStep) -> None:
        """A denoising step has been taken."""

    def show(self, trajectory: Trajectory, answer: Answer, title: str = "") -> None:
        """A whole answer; `title` heads it where there are several."""
        if title:
            print(title)
        if self.show_steps:
            for line in step_lines(trajectory, self.tokenizer):
                self.show_partial(line)
        self.show_partial(answer.text)

    def show_partial(self, text: str) -> None:
        """What there is of an answer that was stopped."""
        print(harmless(text) if sys.stdout.isatty() else text, flush=True)

    def note(self, text: str) -> None:
        """Something about the answers."""
        print(text, file=sys.stderr, flush=True)


class JsonScreen(PlainScreen):
    """An object a line."""

    def show(self, trajectory: Trajectory, answer: Answer, title: str = "") -> None:
        """`Answer.to_json`."""
        print(answer.to_json(), flush=True)

    def show_partial(self, text: str) -> None:
        """Nothing: it is no answer."""


def harmless(text: str) -> str:
    """With a sign for every control character: a model may write what a terminal takes for an order."""
    return text.translate(_VISIBLE_CONTROLS)


def build_screen(student: Student, *, as_json: bool, show_steps: bool) -> PlainScreen:
    """The one that fits stdout: nothing moves and nothing is coloured where that is no terminal, or under NO_COLOR."""
    if as_json:
        return JsonScreen(student, show_steps)
    if is_plain():
        return PlainScreen(student, show_steps)
    from megatron_opdlm.terminal.live import LiveScreen

    return LiveScreen(student, show_steps)


def is_plain() -> bool:
    """Whether stdout is to get text alone: https://no-color.org, and terminals that cannot move their cursor."""
    return not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in ("dumb", "unknown")
