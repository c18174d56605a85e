"""An answer as it is shown and written, made from what the engine decoded.

answer = Answer.of(trajectory, tokenizer)
answer.text, answer.token_ids, answer.step_map
print(answer.to_json())                             # one line
for line in step_lines(trajectory, tokenizer): ...  # the block after each denoising step
Cost(tokens=48, steps=20, seconds=0.5).line()       # "48 tokens in 0.5 s, 96.0 tokens/s, 2.40 tokens per step"
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_opdlm.diffusion.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK_GLYPH = "░"
"""Stands for a place that is still masked."""


@dataclass(frozen=True)
class Answer:
    """What `--json` prints."""

    prompt_ids: list[int]
    token_ids: list[int]
    """Up to and including the first end token, cut at the limit."""
    step_map: list[int]
    """For each of these tokens the denoising step, from 1 within its block, that committed it."""
    text: str
    """Without special tokens."""
    stop_reason: str
    """`end_token`, `length`, or `not_finite` where a logit was not."""
    num_steps: int
    tokens_per_step: float

    @classmethod
    def of(cls, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Answer:
        """The tokens that count."""
        token_ids = trajectory.response_ids.tolist()
        return cls(
            prompt_ids=trajectory.terminal_ids_T[: trajectory.prompt_length].tolist(),
            token_ids=token_ids,
            step_map=trajectory.step_map_R[: trajectory.response_length].tolist(),
            text=tokenizer.decode(token_ids, skip_special_tokens=True),
            stop_reason=trajectory.stop_reason,
            num_steps=trajectory.num_steps,
            tokens_per_step=trajectory.tokens_per_step,
        )

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True)
class Cost:
    """Of some answers together."""

    tokens: int
    steps: int
    seconds: float

    def line(self) -> str:
        """For people."""
        return (
            f"{self.tokens} tokens in {self.seconds:.1f} s, {self.tokens / self.seconds:.1f} tokens/s, "
            f"{self.tokens / self.steps:.2f} tokens per step"
        )


@contextlib.contextmanager
def record_to(path: Path | None) -> Iterator[Callable[[Answer], None]]:
    """What is given to the function stands in the file, a line each. The file appears when the block ends well.

    Until then, and if it does not, the lines are in `FILE.partial`. ValueError if that cannot be written.
    """
    if path is None:
        yield lambda answer: None
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--output ({path}) cannot be written: {error.strerror}") from error
    with file:
        yield lambda answer: print(answer.to_json(), file=file, flush=True)
    partial.replace(path)


def step_lines(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """For each denoising step its block after it, tokens apart by `|`, and the confidences of what it committed.

    Example: the second step of the third block has committed its first token and its last one:
        block 3 step 2 |1|░|2|=| 0.52 0.99
    """
    blocks_MK = trajectory.terminal_ids_T.view(-1, trajectory.block_size)[-len(trajectory.steps_by_block_MK) :]
    unknown = torch.ones(blocks_MK.numel() - len(trajectory.log_probs_R))
    confidences_MK = torch.cat([unknown, trajectory.log_probs_R.exp()]).view_as(blocks_MK)
    rows = zip(blocks_MK.tolist(), trajectory.steps_by_block_MK.tolist(), confidences_MK.tolist(), strict=True)
    for number, (ids, steps, confidences) in enumerate(itertools.islice(rows, trajectory.num_blocks), start=1):
        tokens = [_on_one_line(tokenizer.decode([token_id])) for token_id in ids]
        for step in sorted(set(steps) - {0}):
            shown = [token if own <= step else MASK_GLYPH for token, own in zip(tokens, steps, strict=True)]
            sure = [f"{confidence:.2f}" for confidence, own in zip(confidences, steps, strict=True) if own == step]
            yield f"block {number} step {step} |{'|'.join(shown)}| {' '.join(sure)}"


def _on_one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
