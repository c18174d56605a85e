"""Attention of a rollout's tokens to keys and values in pages, by the flash-attention package's kernel for caches.

Every block of K queries is one entry of the kernel's batch, with its sequence's row of the page table and a length, the
end of the block: up to there everything cached is what all of the block's queries see, so no mask is needed and no key
that fills up is read. The heads that share keys become further queries of the entry, so the keys are read once for all
of them. What an entry looks like depends on nothing but K, so a forward's shapes depend on its number of tokens alone
(`rollout.forward_graphs`).

    kernel = load_kernel(case)                                            # ValueError: a version that is not understood
    attention = FlashPagedAttention(block_size=4, kernel=kernel, device=device)
    out_TND = attention.attend(attention.lay_out(tokens), heads_TGJD, key_pages, value_pages, scale)

The cost: n blocks of a prompt that are read in one forward read their common prefix n times, where a kernel with tiles
of 128 queries reads it n K / 128 times for each head. Beside the linear layers that is little for prompts of a few
thousand tokens, and denoising steps, which are nearly all forwards, have nothing to share.

Read for this: flash-attn 2.7.0 to 2.8.4, flash-attn 3 from January 2025 to August 2026. Not yet run on a GPU.

Legend: `T` tokens, `E` entries, `W` positions of each, `P` pages, `N` heads, `G` key-value heads, `J` the heads of a
group: queries and behind them their key, `D` head dimension.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import NamedTuple

import torch
from packaging.version import InvalidVersion, Version

from megatron_opdlm.models.attention.backend import AttentionCase
from megatron_opdlm.models.attention.flash import installed_module
from megatron_opdlm.models.attention.requirements import gpu_refusal
from megatron_opdlm.parallel.device import to_device
from megatron_opdlm.rollout.kv_cache import QueryTokens, listed

PAGE_SIZES = {"fa2": 256, "fa3": 64}
"""Version 2 takes multiples of 256 only ("Paged KV cache block size must be divisible by 256", flash_api.cpp), version
3 any; small pages waste less where a sequence ends."""

FIRST_THAT_WAITS = Version("2.8.4")
"""From here on version 2 reads the largest length on the host to check it (pull request 2711), in every call. That
waits for the GPU, and a CUDA graph cannot hold it."""

_NEEDED = ("q", "k_cache", "v_cache", "cache_seqlens", "softmax_scale", "causal")
_TABLES = ("block_table", "page_table")
"""What versions 2 and 3 call the page table."""


def flash_refusal(case: AttentionCase) -> str | None:
    """Why the kernel cannot serve a model here, as a clause; None if it can. Imports nothing heavy."""
    if reason := gpu_refusal(case):
        return reason
    if installed_module(case) is None:
        return "the package flash-attn (2.7 or newer, or 3) is not installed"
    return None


def load_kernel(case: AttentionCase) -> PagedKernel:
    """Imports the package. ValueError: it does not load, or its version is not understood."""
    generation, module_name = installed_module(case)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:  # built for another PyTorch or CUDA
        raise ValueError(f"rollout.attention flash: {module_name} cannot be imported: {error}") from error
    return PagedKernel(module, generation)


class PagedKernel:
    """`flash_attn_with_kvcache` of one version of the package, without a causal mask."""

    def __init__(self, module: ModuleType, generation: str) -> None:
        """`generation`: `fa2` or `fa3`. ValueError: the function is not there, or takes no page table."""
        version = getattr(sys.modules.get(module.__name__.split(".")[0], module), "__version__", "")
        self.source = f"{module.__name__} {version or '(version unknown)'}"
        if not hasattr(module, "flash_attn_with_kvcache"):
            raise ValueError(f"rollout.attention flash: {self.source} has no flash_attn_with_kvcache")
        self._function = module.flash_attn_with_kvcache
        parameters = inspect.signature(self._function).parameters
        missing = [name for name in _NEEDED if name not in parameters]
        tables = [name for name in _TABLES if name in parameters]
        if missing or not tables:
            lacking = ", ".join(missing) or " and ".join(_TABLES)
            raise ValueError(f"rollout.attention flash: flash_attn_with_kvcache of {self.source} lacks {lacking}")
        self._table = tables[0]
        self.page_size = PAGE_SIZES[generation]
        self.waits_for_gpu = generation == "fa2" and _may_wait(version)
        """Whether a call copies a number to the host."""

    def __call__(
        self,
        query_EWGD: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        entries: Entries,
        scale: float,
    ) -> torch.Tensor:
        """`[E, W, G, D]`: each entry's queries attend to as many of its cached tokens as its length says."""
        table = {self._table: entries.page_table_EP}
        return self._function(
            q=query_EWGD,
            k_cache=key_pages,
            v_cache=value_pages,
            cache_seqlens=entries.lengths_E,
            softmax_scale=scale,
            causal=False,
            **table,
        )


def _may_wait(version: str) -> bool:
    try:
        return Version(version) >= FIRST_THAT_WAITS
    except InvalidVersion:
        return True


class Entries(NamedTuple):
    """The layout of a forward, on the device.

    Example: blocks of 4; one sequence (page 7) denoises its second block, another one (pages 3 and 2, of 4 tokens)
    commits its first block and takes the first step of its second one:
        lengths_E = [8, 4, 8], page_table_EP = [[7, 0], [3, 2], [3, 2]]
    """

    lengths_E: torch.Tensor
    """int32: the end of each entry's block."""
    page_table_EP: torch.Tensor
    """int32: the pages of its sequence. As wide as the longest sequence may need, whatever the lengths are."""


class FlashPagedAttention:
    """See the module."""

    def __init__(self, block_size: int, kernel: PagedKernel, device: torch.device) -> None:
        self.block_size, self.kernel, self.device = block_size, kernel, device
        self.page_size, self.is_capturable = kernel.page_size, not kernel.waits_for_gpu
        self.num_pairs = self.num_hidden_pairs = 0
        """Query-key pairs so far, per layer and head; none is hidden by a mask."""

    def lay_out(self, tokens: QueryTokens) -> Entries:
        """An entry for each block of the list."""
        width = min(self.block_size, int(tokens.counts_A.max()))
        assert not (tokens.counts_A % width).any(), "a forward reads whole blocks"
        sequence_E, place_E = listed(torch.zeros_like(tokens.counts_A), tokens.counts_A // width)
        lengths_E = tokens.first_A[sequence_E] + (place_E + 1) * width
        self.num_pairs += width * int(lengths_E.sum())
        on_device = (to_device(x.int(), self.device) for x in (lengths_E, tokens.page_table_AP[sequence_E]))
        return Entries(*on_device)

    def attend(
        self,
        layout: Entries,
        heads_TGJD: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        scale: float,
        read_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[T, N, D]`, from pages `[pages, page_size, G, D]`; with `read_N` the rows of these tokens."""
        # [T, G, heads per group, D] -> [E, K, heads per group, G, D]
        grouped = heads_TGJD[:, :, :-1].unflatten(0, (len(layout.lengths_E), -1)).transpose(2, 3)
        attended = self.kernel(grouped.flatten(1, 2), key_pages, value_pages, layout, scale)
        out_TND = attended.view(grouped.shape).transpose(2, 3).flatten(2, 3).flatten(0, 1)
        return out_TND if read_N is None else out_TND.index_select(0, read_N)
