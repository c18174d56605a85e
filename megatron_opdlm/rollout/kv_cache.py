"""Keys and values of everything that the sequences have read, in pages, and attention over them.

A forward of the rollout is a flat list of tokens, each with its sequence and its absolute position, so sequences of any
length and in any phase share it and no linear layer sees padding. What the cache needs to know of them is worked out
once per forward, on the host:

    cache = KeyValueCache(num_pages=64, page_size=64, attention=PagedAttention(block_size=4, ...))
    with attached(model, cache):
        placed = cache.place(tokens)
        hidden = yield from cached_forward(model, cache, placed)       # rollout.forward

A token attends to its sequence's cached tokens of its own block and of earlier blocks. The entries of a block are
overwritten by each denoising step, and a last time, by its clean tokens, when the next block begins.

Legend: `T` tokens of a forward, `A` sequences of it, `P` pages of a sequence, `N` heads, `G` key-value heads, `J` the
heads of a group: queries and behind them their key, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import torch

from megatron_opdlm.models.decoding_layer import DecodingLayer
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.models.rotary import Rotation
from megatron_opdlm.parallel.device import to_device

Layout = TypeVar("Layout")


@dataclass(frozen=True)
class QueryTokens:
    """The tokens of one forward, on the host: those of a sequence one behind the other, at neighbouring positions.

    Example: one sequence denoises block 1, another commits block 0 while it takes the first step of block 1 (K = 2),
    with pages of 4 tokens:
        ids_T = [90, 99, 7, 8, 99, 99], first_A = [2, 0], counts_A = [2, 4], page_table_AP = [[5], [1]]
    """

    ids_T: torch.Tensor
    first_A: torch.Tensor
    """Position of each sequence's first token here; the start of a block."""
    counts_A: torch.Tensor
    """Tokens of each sequence here, whole blocks."""
    page_table_AP: torch.Tensor
    """The pages that each sequence owns, in the order of its positions."""
    read_N: torch.Tensor | None = None
    """Which tokens of the list have an output that somebody reads; None: all of them."""

    @cached_property
    def starts_A(self) -> torch.Tensor:
        """Where in the list each sequence's tokens begin."""
        return self.counts_A.cumsum(0) - self.counts_A

    @cached_property
    def end_A(self) -> torch.Tensor:
        """Behind the last position of each sequence here: so many tokens it has in the cache when they are read."""
        return self.first_A + self.counts_A


def listed(first_A: torch.Tensor, counts_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token of a list, which of the A sequences it belongs to and its position, `[T]` both.

    >>> [x.tolist() for x in listed(torch.tensor([2, 0]), torch.tensor([2, 4]))]
    [[0, 0, 1, 1, 1, 1], [2, 3, 0, 1, 2, 3]]
    """
    sequence_T = torch.arange(len(counts_A)).repeat_interleave(counts_A)
    starts_A = counts_A.cumsum(0) - counts_A
    return sequence_T, torch.arange(len(sequence_T)) + (first_A - starts_A)[sequence_T]


class PagedAttention(Protocol[Layout]):
    """A kernel that attends to keys and values in pages. `rollout.attention_choice` names those there are."""

    page_size: int
    """Tokens of a page."""
    is_capturable: bool
    """Whether a CUDA graph can hold it: a layout is a named tuple of tensors on the device, their shapes follow from
    the number of tokens, and nothing waits for the device."""
    num_pairs: int
    """Query-key pairs so far, per layer and head."""
    num_hidden_pairs: int
    """Those of them that a mask hid."""

    def lay_out(self, tokens: QueryTokens) -> Layout:
        """What all layers of a forward share."""
        ...

    def attend(
        self,
        layout: Layout,
        heads_TGJD: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        scale: float,
        read_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[T, N, D]`, from pages `[pages, page_size, G, D]`; with the layout's `read_N` the rows of these tokens.

        The keys among the heads are in the pages already.
        """
        ...


@dataclass(frozen=True)
class PlacedTokens(Generic[Layout]):
    """The tokens of one forward on the device."""

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    addresses_T: torch.Tensor
    """Where their keys and values go, in tokens from the beginning of the cache."""
    layout: Layout
    read_N: torch.Tensor | None = None
    """As in `QueryTokens`."""


class KeyValueCache:
    """Post-RoPE keys and values `[pages, page_size, G, D]` of each layer of this pipeline stage.

    A layer's are made when it first writes. They begin as zeros: where a mask hides an entry its weight is zero, and
    zero times a finite number is zero.
    """

    def __init__(self, num_pages: int, attention: PagedAttention, device: torch.device) -> None:
        self.num_pages, self.page_size, self.attention, self.device = num_pages, attention.page_size, attention, device
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._placed: PlacedTokens | None = None
        self._rotation: Rotation | None = None
        self.last_layer: int | None = None
        """The number of the layer whose outputs are the model's; None while no model is attached."""

    def place(self, tokens: QueryTokens) -> PlacedTokens:
        """Works out where the tokens go and what each may attend to."""
        sequence_T, positions_T = listed(tokens.first_A, tokens.counts_A)
        pages_T = tokens.page_table_AP[sequence_T, positions_T // self.page_size]
        addresses_T = pages_T * self.page_size + positions_T % self.page_size
        on_device = (to_device(tensor, self.device) for tensor in (tokens.ids_T, positions_T, addresses_T))
        read_N = None if tokens.read_N is None else to_device(tokens.read_N, self.device)
        return PlacedTokens(*on_device, layout=self.attention.lay_out(tokens), read_N=read_N)

    def clear(self, pages: torch.Tensor) -> None:
        """Makes zeros of these pages, so that what is not finite in them reaches nobody who gets them next."""
        for memory in (*self._keys.values(), *self._values.values()):
            memory[to_device(pages, self.device)] = 0

    def begin_forward(self, placed: PlacedTokens, rotation: Rotation) -> None:
        """The layers that follow read these tokens, whose queries and keys turn as their positions say."""
        self._placed, self._rotation = placed, rotation

    def attend(
        self, layer_number: int, heads_TGJD: torch.Tensor, value_TGD: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Turns queries and keys, stores keys and values at their tokens' places, attends to everything visible.

        The heads of a group J are its queries and behind them its key. `[T, N, D]`; in the last layer the rows that are
        read. Tokens beyond those of `begin_forward` are padding of the sequence-parallel shards; they get zeros.
        """
        num_tokens = len(self._placed.ids_T)
        turned_TGJD = self._rotation.of(heads_TGJD[:num_tokens])
        keys = self._store(layer_number, self._keys, turned_TGJD[:, :, -1])
        values = self._store(layer_number, self._values, value_TGD[:num_tokens])
        read_N = self._placed.read_N if layer_number == self.last_layer else None
        out = self.attention.attend(self._placed.layout, turned_TGJD, keys, values, scale, read_N)
        padding = len(heads_TGJD) - num_tokens
        return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out

    def outputs_read(self, rows_T: torch.Tensor) -> torch.Tensor:
        """Of a tensor with a row for each token, the rows of tokens whose outputs are read."""
        return rows_T if self._placed.read_N is None else rows_T.index_select(0, self._placed.read_N)

    def _store(self, layer_number: int, memory: dict[int, torch.Tensor], fresh_TGD: torch.Tensor) -> torch.Tensor:
        """Writes the fresh entries and returns the pages of the layer."""
        if layer_number not in memory:
            memory[layer_number] = fresh_TGD.new_zeros(self.num_pages, self.page_size, *fresh_TGD.shape[1:])
        memory[layer_number].flatten(0, 1).index_copy_(0, self._placed.addresses_T, fresh_TGD)
        return memory[layer_number]


@contextmanager
def attached(model: PipelineModel, cache: KeyValueCache) -> Iterator[None]:
    """While it lasts, the model's layers decode against `cache`."""
    layers = [module for module in model.modules() if isinstance(module, DecodingLayer)]
    assert layers, "no layer to attach a cache to"
    cache.last_layer = model.config.num_layers
    for layer in layers:
        layer.cache = cache
    try:
        yield
    finally:
        for layer in layers:
            layer.cache = None
