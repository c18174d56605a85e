"""Keys and values of everything a batch of sequences has read, and attention over them.

A forward of the rollout is a flat list of tokens, each with its row and its absolute position, so sequences of any
length and in any phase share it and no linear layer sees padding. The cache is what turns that list back into rows:

    cache = KeyValueCache(num_rows=2, max_length=16, block_size=4)
    with attached(model, cache):
        hidden = yield from cached_forward(model, cache, tokens)       # rollout.forward

A token attends to its row's cached tokens of its own block and of earlier blocks. The entries of a block are
overwritten by each denoising step, and a last time, by its clean tokens, when the next block begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_opdlm.diffusion.attention_pattern import may_attend
from megatron_opdlm.models.attention.core_attention import BlockDiffusionCoreAttention
from megatron_opdlm.models.pipeline import PipelineModel


@dataclass(frozen=True)
class QueryTokens:
    """The tokens of one forward: `ids_T[i]` stands in cache row `rows_T[i]` at position `positions_T[i]`.

    Rows ascend, and positions within a row.

    Example: row 0 denoises block 1 and row 2 commits block 0 while it takes the first step of block 1 (K = 2):
        ids_T = [90, 99, 7, 8, 99, 99], rows_T = [0, 0, 2, 2, 2, 2], positions_T = [2, 3, 0, 1, 2, 3]
    """

    ids_T: torch.Tensor
    rows_T: torch.Tensor
    positions_T: torch.Tensor


class KeyValueCache:
    """Post-RoPE keys and values `[rows, max_length, G, D]` of each layer of this pipeline stage.

    A layer's are made when it first writes.
    """

    def __init__(self, num_rows: int, max_length: int, block_size: int) -> None:
        self.num_rows = num_rows
        self.max_length = max_length
        self.block_size = block_size
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    def begin_forward(self, tokens: QueryTokens) -> None:
        """Works out, once for all layers, where the tokens go and what each may attend to."""
        self._tokens = tokens
        self._active_rows, slots_T, counts = torch.unique_consecutive(
            tokens.rows_T, return_inverse=True, return_counts=True
        )
        starts = counts.cumsum(0) - counts
        offsets_T = torch.arange(len(slots_T), device=slots_T.device) - starts[slots_T]
        self._place = (slots_T, offsets_T)
        self._num_slots, self._width = len(counts), int(counts.max())
        last_B = tokens.positions_T[starts + counts - 1]
        self._end = int(last_B.max()) + 1
        self._mask = self._visible(tokens.positions_T, last_B)

    def _visible(self, positions_T: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
        """Bool `[rows, 1, queries, keys]`; queries that only fill up a row see the first key, to stay finite."""
        queries = positions_T.new_zeros(self._num_slots, self._width)
        queries[self._place] = positions_T
        keys = torch.arange(self._end, device=positions_T.device)
        # Up to its own block everything cached for a row is what the query may see: earlier blocks are clean, and the
        # entries of its own block come from its own stream. That is the pattern of a clean query among clean keys.
        is_noisy = torch.zeros((), dtype=torch.bool, device=keys.device)
        pattern = may_attend(queries[..., None], is_noisy, keys, is_noisy, self.block_size)
        return (pattern & (keys <= last_B[:, None, None]))[:, None]

    def attend(
        self, layer_number: int, query_TND: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Stores keys and values at their tokens' places, attends to everything visible: `[T, N, D]`.

        Tokens beyond `begin_forward`'s list are padding of the sequence-parallel shards; they get zeros.
        """
        num_tokens, (slots_T, offsets_T) = len(self._tokens.rows_T), self._place
        keys = self._store(layer_number, self._keys, key_TGD[:num_tokens])
        values = self._store(layer_number, self._values, value_TGD[:num_tokens])
        padded = query_TND.new_zeros(self._num_slots, self._width, *query_TND.shape[1:])
        padded[slots_T, offsets_T] = query_TND[:num_tokens]
        # The heads that share keys become further queries: with a mask, kernels for grouped heads are few and slow.
        grouped = padded.unflatten(2, (key_TGD.shape[1], -1)).permute(0, 2, 3, 1, 4)
        heads_per_group = grouped.shape[2]
        attended = F.scaled_dot_product_attention(
            grouped.flatten(2, 3),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self._mask.repeat(1, 1, heads_per_group, 1),
            scale=scale,
        )
        by_query = attended.unflatten(2, (heads_per_group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        out = torch.zeros_like(query_TND)
        out[:num_tokens] = by_query[slots_T, offsets_T]
        return out

    def _store(self, layer_number: int, memory: dict[int, torch.Tensor], fresh_TGD: torch.Tensor) -> torch.Tensor:
        """Writes the fresh entries and returns those of the active rows, `[rows, end, G, D]`."""
        if layer_number not in memory:
            memory[layer_number] = fresh_TGD.new_zeros(self.num_rows, self.max_length, *fresh_TGD.shape[1:])
        stored = memory[layer_number]
        stored[self._tokens.rows_T, self._tokens.positions_T] = fresh_TGD
        if self._num_slots == self.num_rows:
            return stored[:, : self._end]
        return stored[self._active_rows, : self._end]


@contextmanager
def attached(model: PipelineModel, cache: KeyValueCache) -> Iterator[None]:
    """While it lasts, the student's core attention decodes against `cache`."""
    cores = [module for module in model.modules() if isinstance(module, BlockDiffusionCoreAttention)]
    assert cores, "only a student has block-diffusion attention to attach a cache to"
    for core in cores:
        core.cache = cache
    try:
        yield
    finally:
        for core in cores:
            core.cache = None
