"""A block-diffusion sampler as one would write it with `transformers`, for `benchmark_rollout.py` to compare with.

    sampler = PlainSampler(model, prompts, mask_token_id=341, block_size=4, denoising_steps=4, new_tokens=64)
    sampler.decode()                       # a response per prompt
    sampler.counts["num_forwards"]

It follows the same rules as the rollout (the absolute block grid, the rest of a prompt opening its first block, a mask
token that is never drawn, `low_confidence_static`), so at temperature 0 it writes the same tokens. One static batch:
prompts are padded on the left by whole blocks, hence all rows start their first block in the same column, and go from
block to block together until the last of them is done, at an end token or at its longest. The clean prefix is in a
`DynamicCache`. A denoising step forwards the block, takes the logits of all its positions and crops the cache again;
when the block is clean, one more forward leaves its keys and values there.

It is not slow on purpose: batched and cached, `sdpa` under boolean masks made once per block, no logits of the prefill
and of commits, no step for a block that no row needs, no commit behind the last block.

Legend: `B` sequences, `L` columns (`Q` of them are read), `K` of a block, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


class PlainSampler:
    """Prompts side by side: column `c` of row `b` is position `c - pad_B[b]` of its sequence."""

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        prompts: Sequence[Sequence[int]],
        *,
        mask_token_id: int,
        block_size: int,
        denoising_steps: int,
        new_tokens: int,
        temperature: float = 0.0,
        end_token_ids: Sequence[int] = (),
    ) -> None:
        self.model, self.mask_token_id, self.temperature = model, mask_token_id, temperature
        self.end_token_ids = torch.tensor(end_token_ids, dtype=torch.long, device=model.device)
        self.block_size, self.denoising_steps, self.new_tokens = block_size, denoising_steps, new_tokens
        clean = [len(ids) // block_size * block_size for ids in prompts]
        self.width, self.num_prefilled = max(clean), sum(clean)
        self.begins = [self.width + len(ids) % block_size for ids in prompts]
        ends = [-(-(begin + new_tokens) // block_size) * block_size for begin in self.begins]
        self.end_B = torch.tensor(ends, device=model.device)
        self.pad_B = torch.tensor([self.width - num_clean for num_clean in clean], device=model.device)
        self.ids_BL = torch.full((len(prompts), max(ends)), mask_token_id, device=model.device)
        self.is_masked_BL = torch.zeros_like(self.ids_BL, dtype=torch.bool)
        for row, (ids, begin, end) in enumerate(zip(prompts, self.begins, ends, strict=True)):
            self.ids_BL[row, begin - len(ids) : begin] = torch.tensor(ids, device=model.device)
            self.is_masked_BL[row, begin:end] = True
        self.cache, self.counts = DynamicCache(config=model.config), Counter()

    @torch.inference_mode()
    def decode(self) -> list[list[int]]:
        """The ids after each prompt: `new_tokens` of them, or up to and with the first end token."""
        size, num_columns = self.block_size, self.ids_BL.shape[1]
        if self.width:
            self._read(slice(0, self.width), *self._view(0, self.width))
            self._count(self.num_prefilled, is_clean=True)
        for begin in range(self.width, num_columns, size):
            block, view = slice(begin, begin + size), self._view(begin, begin + size)
            self._denoise(block, view)
            self._end_rows(block)
            num_going_on = int((self.end_B > block.stop).sum())
            if not num_going_on:
                break
            self._read(block, *view)
            self._count(num_going_on * size, is_clean=True, num_sequences=num_going_on)
        return [self._response(row) for row in range(len(self.begins))]

    @property
    def num_written(self) -> int:
        """Tokens that were decoded, with those that fill up the last blocks."""
        return int(self.end_B.sum()) - sum(self.begins)

    def _end_rows(self, block: slice) -> None:
        """A row with an end token in the block, behind its prompt, goes no further."""
        columns = torch.arange(block.start, block.stop, device=self.ids_BL.device)
        is_written_BK = columns >= torch.tensor(self.begins, device=self.ids_BL.device)[:, None]
        has_ended_B = (torch.isin(self.ids_BL[:, block], self.end_token_ids) & is_written_BK).any(1)
        self.end_B[has_ended_B] = self.end_B[has_ended_B].clamp(max=block.stop)
        self.is_masked_BL[has_ended_B, block.stop :] = False

    def _response(self, row: int) -> list[int]:
        ids_R = self.ids_BL[row, self.begins[row] :][: self.new_tokens]
        ends = torch.isin(ids_R, self.end_token_ids).nonzero()
        return ids_R[: int(ends[0]) + 1 if len(ends) else None].tolist()

    def _view(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Whom these columns see, bool `[B, 1, Q, L]`: earlier blocks and their own, no padding. And their positions.

        Padding sees itself, lest its softmax be empty.
        """
        columns = torch.arange(end, device=self.ids_BL.device)
        queries = columns[begin:, None]
        is_visible_BQL = (columns >= self.pad_B[:, None, None]) | (columns == queries)
        is_visible_BQL &= columns // self.block_size <= queries // self.block_size
        return is_visible_BQL[:, None], (columns[begin:] - self.pad_B[:, None]).clamp(min=0)

    def _read(self, columns: slice, is_visible: torch.Tensor, positions_BQ: torch.Tensor) -> torch.Tensor:
        """Hidden states `[B, Q, H]` of the columns, whose keys and values go to the end of the cache."""
        self.counts.update(num_pairs=is_visible.numel(), num_hidden_pairs=int((~is_visible).sum()))
        return self.model.model(
            self.ids_BL[:, columns],
            attention_mask=is_visible,
            position_ids=positions_BQ,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _denoise(self, block: slice, view: tuple[torch.Tensor, torch.Tensor]) -> None:
        """The steps of one block, until no row has a mask in it; rows that have none left wait."""
        ids_BK, is_masked_BK = self.ids_BL[:, block], self.is_masked_BL[:, block]  # views of the whole
        for step in range(self.denoising_steps):
            num_waited_for = int(is_masked_BK.any(1).sum())
            if not num_waited_for:
                return
            drawn_BK, confidence_BK = self._draw(self._read(block, *view))
            self.cache.crop(-self.block_size)
            self._count(num_waited_for * self.block_size, num_sequences=num_waited_for)
            ranked_BK = confidence_BK.masked_fill(~is_masked_BK, -1.0).argsort(dim=1, descending=True, stable=True)
            quotient, remainder = divmod(self.block_size, self.denoising_steps)
            best_BK = torch.zeros_like(is_masked_BK).scatter(1, ranked_BK[:, : quotient + (step < remainder)], True)
            is_committed_BK = best_BK & is_masked_BK
            ids_BK[is_committed_BK] = drawn_BK[is_committed_BK]
            is_masked_BK[is_committed_BK] = False

    def _draw(self, hidden_BKH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each position, and the probability that the model gives it."""
        logits_BKV = self.model.lm_head(hidden_BKH).float()
        logits_BKV[..., self.mask_token_id] = float("-inf")
        probabilities_BKV = logits_BKV.softmax(-1)
        if not self.temperature:
            confidence_BK, drawn_BK = probabilities_BKV.max(-1)
            return drawn_BK, confidence_BK
        scaled_BKV = (logits_BKV / self.temperature).softmax(-1)
        drawn_BK1 = scaled_BKV.flatten(0, 1).multinomial(1).view(*scaled_BKV.shape[:2], 1)
        return drawn_BK1[..., 0], probabilities_BKV.gather(-1, drawn_BK1)[..., 0]

    def _count(self, num_used: int, *, is_clean: bool = False, num_sequences: int = 0) -> None:
        """One forward, of whose tokens `num_used` are not padding and not of rows that wait.

        `num_sequences` take part in it beyond their prefill.
        """
        self.counts.update(
            num_forwards=1,
            num_sequence_steps=num_sequences,
            num_query_tokens=num_used,
            num_clean_tokens=num_used if is_clean else 0,
        )
