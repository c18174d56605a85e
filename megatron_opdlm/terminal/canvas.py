"""A response while it is denoised: text where tokens are committed, gaps where places are masked.

    canvas = Canvas(prompt_length=6, block_size=4, end_token_ids=(9,), tokenizer=tokenizer)
    canvas.commit(step)                                 # a `DenoisingStep`
    canvas.pieces()                                     # [Piece("1", 0.97, False), Piece(None, 0.0, False), ...]
    canvas.text                                         # what stands before the first masked place

Tokens are turned into text one by one, but for those that share a character: a character of several bytes can be spread
over tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron_opdlm.diffusion.blocks import block_start
from megatron_opdlm.rollout.denoising_step import DenoisingStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_OF_CHARACTER = 4
"""A character of UTF-8 has as many bytes at most, and a token at least one."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How the text of tokens ends that hold the first bytes of a character only."""


class Piece(NamedTuple):
    """Tokens that are shown together, mostly one."""

    text: str | None
    """None for a masked place."""
    confidence: float
    """Of the least confident of them."""
    is_latest: bool = False
    """Whether the latest step committed one of them."""


class _Token(NamedTuple):
    id: int
    confidence: float
    step: int
    """Number of the step that committed it, over all blocks."""


class Canvas:
    """One response."""

    def __init__(
        self, prompt_length: int, block_size: int, end_token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.num_steps, self.tokenizer = 0, tokenizer
        self._prompt_length, self._block_size, self._end_ids = prompt_length, block_size, set(end_token_ids)
        self._tokens: list[_Token | None] = []
        self._settled: list[Piece] = []
        self._num_settled = 0
        """Tokens at the beginning whose pieces do not change any more."""
        self._reach(block_start(prompt_length, block_size))

    def commit(self, step: DenoisingStep) -> None:
        """Fills in what a step has committed; where it was the last of its block, the next one is masked."""
        self.num_steps += 1
        self._reach(step.block_start)
        for position, token_id, confidence in zip(step.positions, step.token_ids, step.confidences, strict=True):
            self._tokens[position - self._prompt_length] = _Token(token_id, confidence, self.num_steps)
        if None not in self._tokens[-self._block_size :]:
            self._reach(step.block_start + self._block_size)

    @property
    def num_tokens(self) -> int:
        """Committed so far, up to the end token."""
        return sum(token is not None for token in self._shown())

    @property
    def text(self) -> str:
        """What stands before the first masked place."""
        ids = [token.id for token in itertools.takewhile(lambda token: token is not None, self._shown())]
        return self.tokenizer.decode(ids, skip_special_tokens=True).rstrip(UNFINISHED)

    def pieces(self) -> list[Piece]:
        """Up to the end token, or to the end of the block in work."""
        shown = self._shown()
        self._settle(shown)
        pieces = list(self._settled)
        for is_masked, run in itertools.groupby(shown[self._num_settled :], key=lambda token: token is None):
            tokens = list(run)
            pieces += [Piece(None, 0.0)] * len(tokens) if is_masked else self._pieces_of(tokens)
        return pieces

    def _reach(self, start: int) -> None:
        """Places up to the end of the block that starts there."""
        missing = start + self._block_size - self._prompt_length - len(self._tokens)
        self._tokens += [None] * max(missing, 0)

    def _shown(self) -> list[_Token | None]:
        for place, token in enumerate(self._tokens):
            if token is not None and token.id in self._end_ids:
                return self._tokens[:place]
        return self._tokens

    def _settle(self, shown: list[_Token | None]) -> None:
        """All before the block in work, but for tokens that may share a character with those to come."""
        end = len(shown) - self._block_size - TOKENS_OF_CHARACTER
        run = shown[self._num_settled : max(end, 0)]
        if None in run or len(run) < self._block_size:
            return
        groups = token_groups([token.id for token in run], self.tokenizer)
        for count, text in groups[:-1]:
            group = shown[self._num_settled : self._num_settled + count]
            self._settled.append(Piece(text, min(token.confidence for token in group)))
            self._num_settled += count

    def _pieces_of(self, run: list[_Token]) -> list[Piece]:
        pieces, start = [], 0
        for count, text in token_groups([token.id for token in run], self.tokenizer):
            group, start = run[start : start + count], start + count
            is_latest = any(token.step == self.num_steps for token in group)
            pieces.append(Piece(text, min(token.confidence for token in group), is_latest))
        return pieces


def token_groups(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    """Number of tokens and their text, group by group: single tokens, or those that share a character."""
    groups, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=True)
        is_unfinished = text.endswith(UNFINISHED) and end - start < TOKENS_OF_CHARACTER
        if end == len(ids) or not is_unfinished:
            groups.append((end - start, text))
            start = end
    return groups
