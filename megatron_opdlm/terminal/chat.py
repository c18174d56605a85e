"""Turns of a conversation with the student, typed at the terminal or read from a pipe.

    Chat(student, screen, config.data, record=print).run()

The whole conversation goes through the chat template before each answer. Without the template (`--raw`) each line is
gone on from by itself. ctrl-C stops an answer between two denoising steps; what stands before its first masked place
stays in the conversation. Under torchrun ctrl-C ends the program: torchrun ends its processes.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

from megatron_opdlm.config.schema import DataConfig
from megatron_opdlm.data.prompts import Prompt, check_row
from megatron_opdlm.rollout.denoising_step import DenoisingStep
from megatron_opdlm.terminal.answers import Answer, Cost
from megatron_opdlm.terminal.canvas import Canvas
from megatron_opdlm.terminal.questions import tokenize_questions
from megatron_opdlm.terminal.screens import PlainScreen
from megatron_opdlm.terminal.student import Student

PROMPT = "> "
COMMANDS = "/reset begins anew, /steps shows denoising steps, /quit ends, ctrl-C stops"


class AnswerStopped(Exception):
    """The person at the terminal has seen enough."""


class Chat:
    """A conversation."""

    def __init__(
        self, student: Student, screen: PlainScreen, data: DataConfig, record: Callable[[Answer], None]
    ) -> None:
        self.student, self.screen, self.data, self.record = student, screen, data, record
        self._messages: list[dict[str, str]] = []
        self._num_turns = 0

    def run(self) -> None:
        """Until /quit or the end of the input."""
        if sys.stdin.isatty():
            self.screen.note(COMMANDS)
        while (line := _read_line()) is not None and line.strip() != "/quit":
            if line.startswith("/"):
                self._obey(line.strip())
            elif line.strip():
                self._ask(line)

    def _obey(self, command: str) -> None:
        if command == "/reset":
            self._messages = []
            self.screen.note("a conversation from the beginning")
        elif command == "/steps":
            self.screen.show_steps = not self.screen.show_steps
            self.screen.note(f"denoising steps are {'shown' if self.screen.show_steps else 'left out'}")
        else:
            self.screen.note(f"{command} is no command: {COMMANDS}")

    def _ask(self, line: str) -> None:
        asked = {"role": "user", "content": line}
        try:
            prompt = self._prompt(asked)
        except ValueError as error:
            self.screen.note(f"error: {error}")
            return
        text = self._answer(prompt)
        if text:
            self._messages += [asked, {"role": "assistant", "content": text}]

    def _prompt(self, asked: dict[str, str]) -> Prompt:
        question = [*self._messages, asked] if self.data.apply_chat_template else asked["content"]
        row = check_row("the message", {"question": question})
        (prompt,) = tokenize_questions([row], self.student.tokenizer, self.data)
        self.student.check_length(prompt)
        return prompt

    def _answer(self, prompt: Prompt) -> str:
        """Shows the answer; its text, or what there is of it."""
        ends = self.student.opened.special.end_token_ids
        canvas = Canvas(len(prompt.token_ids), self.student.rollout.block_size, ends, self.student.tokenizer)
        self._num_turns += 1
        started = time.perf_counter()
        try:
            with self.screen.watching([prompt]), _stop_on_interrupt() as check:

                def on_step(step: DenoisingStep) -> None:
                    canvas.commit(step)
                    self.screen.on_step(step)
                    check()

                (trajectory,) = self.student.answer([prompt], self._num_turns, on_step=on_step)
        except AnswerStopped:
            self.screen.show_partial(canvas.text)
            self.screen.note("stopped")
            return canvas.text
        seconds, answer = time.perf_counter() - started, Answer.of(trajectory, self.student.tokenizer)
        self.screen.show(trajectory, answer)
        self.record(answer)
        self.screen.note(Cost(len(answer.token_ids), answer.num_steps, seconds).line())
        return answer.text


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], None]]:
    """A check that raises AnswerStopped after the first ctrl-C; a second one, before any step is done, interrupts.

    With several ranks ctrl-C is left alone: one rank must not leave a collective that the others wait in.
    """
    is_stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal is_stopped
        if is_stopped:
            raise KeyboardInterrupt
        is_stopped = True

    def check() -> None:
        if is_stopped:
            raise AnswerStopped

    if dist.get_world_size() > 1:
        yield check
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _read_line() -> str | None:
    """None at the end of the input. ctrl-C throws away what has been typed."""
    is_person = sys.stdin.isatty()
    if is_person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` a history and a line that can be edited
    while True:
        try:
            return input(PROMPT if is_person and sys.stdout.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
