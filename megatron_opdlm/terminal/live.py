"""A terminal that shows an answer while it is denoised: tokens appear where they are committed.

    screen = LiveScreen(student, show_steps=False)
    with screen.watching(prompts):
        student.answer(prompts, turn=0, on_step=screen.on_step)

The colour says how confident the model was: red below 0.5, yellow below 0.9, green. What the latest step has committed
is reversed, a masked place is `░`. Of several answers that are made at a time it shows the one that is printed next.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.rollout.denoising_step import DenoisingStep
from megatron_opdlm.terminal.answers import MASK_GLYPH, Answer, step_lines
from megatron_opdlm.terminal.canvas import Canvas, Piece, token_groups
from megatron_opdlm.terminal.screens import PlainScreen, harmless
from megatron_opdlm.terminal.student import Student

SECONDS_BETWEEN_FRAMES = 0.04
STYLES = ((0.5, "red"), (0.9, "yellow"), (float("inf"), "green"))
"""Below this confidence: the style."""


class LiveScreen(PlainScreen):
    """With colours, and movement."""

    is_live = True

    def __init__(self, student: Student, show_steps: bool) -> None:
        super().__init__(student, show_steps)
        self.console = Console(highlight=False)
        self._mask = MASK_GLYPH if self.console.encoding.startswith("utf") else "_"
        self._live: Live | None = None
        self._next = 0
        """Place of the answer that is shown."""
        self._canvases: list[Canvas] = []

    def loading(self, folder: str) -> AbstractContextManager:
        """While the weights of this folder are read."""
        return self.console.status(Text(f"reading {folder}"))

    @contextlib.contextmanager
    def watching(self, prompts: Sequence[Prompt]) -> Iterator[None]:
        """While these are answered; a prompt for each answer."""
        block_size, ends = self.student.rollout.block_size, self.student.opened.special.end_token_ids
        self._canvases = [Canvas(len(p.token_ids), block_size, ends, self.tokenizer) for p in prompts]
        self._next, self._started, self._drawn = 0, time.perf_counter(), 0.0
        with Live(console=self.console, auto_refresh=False, transient=True) as self._live:
            self._draw()
            try:
                yield
            finally:
                self._live = None

    def on_step(self, step: DenoisingStep) -> None:
        """Fills in what it has committed, and draws the screen anew if that was not just done."""
        self._canvases[step.index].commit(step)
        if step.index == self._next and time.perf_counter() - self._drawn > SECONDS_BETWEEN_FRAMES:
            self._draw()

    def show(self, trajectory: Trajectory, answer: Answer, title: str = "") -> None:
        """A whole answer; what is behind it in the list is shown from then on."""
        if title:
            self.console.print(Text(title, style="bold"))
        if self.show_steps:
            for line in step_lines(trajectory, self.tokenizer):
                self.console.print(_line(line, "dim"), soft_wrap=True)
        self.console.print(self._coloured(trajectory, answer), soft_wrap=True)
        self._next += 1
        if self._live is not None and self._next < len(self._canvases):
            self._draw()

    def show_partial(self, text: str) -> None:
        """What there is of an answer that was stopped."""
        self.console.print(_line(text), soft_wrap=True)

    def note(self, text: str) -> None:
        """Something about the answers."""
        self.console.print(_line(text, "dim"), soft_wrap=True)

    def _coloured(self, trajectory: Trajectory, answer: Answer) -> Text:
        pieces, start = [], 0
        confidences = trajectory.log_probs_R.exp().tolist()
        for count, text in token_groups(answer.token_ids, self.tokenizer):
            pieces.append(Piece(text, min(confidences[start : start + count])))
            start += count
        if "".join(piece.text for piece in pieces) != answer.text:  # a tokenizer whose tokens have no text of their own
            return _line(answer.text)
        return self._assemble(pieces)

    def _draw(self) -> None:
        """The end of the answer, as much of it as there is room for, and how far it is."""
        canvas, seconds = self._canvases[self._next], time.perf_counter() - self._started
        width, height = self.console.size
        lines = self._assemble(canvas.pieces()[-width * height :]).wrap(self.console, width)
        self._live.update(Group(*lines[-max(height - 2, 1) :], _progress(canvas, seconds)), refresh=True)
        self._drawn = time.perf_counter()

    def _assemble(self, pieces: Sequence[Piece]) -> Text:
        text = Text()
        for piece in pieces:
            text.append(self._mask if piece.text is None else harmless(piece.text), style=_style(piece))
        return text


def _style(piece: Piece) -> str:
    if piece.text is None:
        return "dim"
    colour = next(style for limit, style in STYLES if piece.confidence < limit)
    return f"{colour} reverse" if piece.is_latest else colour


def _progress(canvas: Canvas, seconds: float) -> Text:
    steps, tokens = canvas.num_steps, canvas.num_tokens
    per_step = f", {tokens / steps:.2f} tokens per step" if steps else ""
    return Text(f"{tokens} tokens in {seconds:.1f} s{per_step}", style="dim")


def _line(text: str, style: str = "") -> Text:
    return Text(harmless(text), style=style)
