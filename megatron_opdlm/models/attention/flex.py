"""Block-diffusion attention as one FlexAttention call over the doubled sequence: S clean positions, then S noisy ones.

PyTorch compiles a kernel for the pattern, which leaves out the tiles of 128 x 128 scores that no query attends; there
is no in-block part to merge. Every padded length compiles a forward and a backward kernel (some seconds each) when it
is first seen: set `training.pad_to_multiple` to a coarse multiple of 128, such as 512. Padding costs little here, since
its tiles are left out too. Not yet run on a GPU.

Example:

    >>> backend = FlexAttention(AttentionCase(device_type="cuda", compute_capability=(9, 0), dtype=torch.bfloat16))
    >>> out_clean, out_noisy = backend.attend(streams, lengths=lengths_B, block_size=4, scale=0.125)

Legend: `B` sequences, `S` positions of one stream, `N` query heads, `G` key-value heads, `D` head dimension.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from megatron_opdlm.diffusion.attention_pattern import may_attend
from megatron_opdlm.models.attention.backend import AttentionBackend, AttentionCase, Pair, Streams
from megatron_opdlm.models.attention.requirements import device_refusal, gpu_refusal, is_installed, name_refusal

TILE = 128
"""Positions of a tile in either direction; `S` is padded to a multiple of it, so no tile holds both streams."""

KERNELS = {"triton": "TRITON", "fa4": "FLASH"}
"""Value of `attention.kernel` -> the kernel option `BACKEND` of FlexAttention. `auto` leaves the choice to PyTorch."""

RECOMPILE_LIMIT = 256
"""Kernels that `torch.compile` may make before it gives up; its default is 8, and every length is one here."""

NUM_MASKS_KEPT = 8
"""Micro-batches whose block masks are kept: those in flight in a pipeline, and their backward passes."""

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Indices of sequence, head, query and key -> whether the query attends the key."""


class FlexAttention(AttentionBackend):
    """Compiled FlexAttention with a block mask that is built once for each micro-batch."""

    @classmethod
    def refusal(cls, case: AttentionCase) -> str | None:
        """See `AttentionBackend.refusal`."""
        if case.device_type == "cpu":
            return "FlexAttention has no backward on a CPU"
        if reason := device_refusal(case) or name_refusal(case, tuple(KERNELS)):
            return reason
        if torch.__version__ < (2, 6):
            return f"PyTorch ({torch.__version__}) must be at least 2.6"
        if case.kernel == "fa4":
            return _fa4_refusal(case)
        if case.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"precision.dtype ({case.dtype}) must be bfloat16, float16 or float32"
        if case.head_dim < 16:
            return f"head_dim ({case.head_dim}) must be at least 16"
        return None

    def __init__(self, case: AttentionCase) -> None:
        """Compiles nothing yet; the first call does."""
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
        # Older versions have Triton's kernel alone and no option to say so.
        options = {"BACKEND": KERNELS[case.kernel]} if case.kernel in KERNELS and _has_backends() else None
        # Not compiled as a whole, either would run as plain PyTorch and hold scores or masks of (2S)^2.
        compile_whole = functools.partial(torch.compile, dynamic=False, fullgraph=True)
        self._attend = functools.partial(compile_whole(flex.flex_attention), kernel_options=options)
        self.masks = BlockMasks(compile_whole(flex.create_block_mask), tile_shape(case))

    def attend(self, streams: Streams, *, lengths: torch.Tensor, block_size: int, scale: float) -> Pair:
        """See `AttentionBackend.attend`. Memory grows with `S`; the block mask alone with `(S / 128)^2`."""
        return flex_attend(streams, lengths, block_size, scale, self._attend, self.masks)


def _fa4_refusal(case: AttentionCase) -> str | None:
    if reason := gpu_refusal(case, max_head_dim=128):
        return reason
    if case.compute_capability[0] not in (9, 10):
        major, minor = case.compute_capability
        return f"attention.kernel (fa4) needs compute capability 9.x or 10.x, the GPU has {major}.{minor}"
    if not _has_backends():
        return "attention.kernel (fa4) needs a PyTorch whose FlexAttention has the option BACKEND, such as 2.13"
    if not is_installed("flash_attn.cute.interface"):
        return "attention.kernel (fa4) needs the package flash-attn-4"
    return None


def _has_backends() -> bool:
    options = getattr(flex, "FlexKernelOptions", None)
    return options is not None and "BACKEND" in options.__annotations__


def tile_shape(case: AttentionCase) -> tuple[int, int]:
    """Queries and keys of a tile: FlashAttention-4 takes two tiles of queries at a time from Blackwell on."""
    return (2 * TILE if case.kernel == "fa4" and case.compute_capability >= (10, 0) else TILE, TILE)


def flex_attend(
    streams: Streams,
    lengths: torch.Tensor,
    block_size: int,
    scale: float,
    attend: Callable[..., torch.Tensor],
    masks: BlockMasks,
) -> Pair:
    """Both outputs, [B, S, N, D] each, from one call of `attend`, which is `flex_attention`, compiled or not."""
    length = streams.query_clean.shape[1]
    query, key, value = (doubled(*pair) for pair in zip(streams[:3], streams[3:], strict=True))
    mask = masks.get(lengths, query.shape[2] // 2, block_size)
    out = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    clean, noisy = out.transpose(1, 2).chunk(2, dim=1)
    return clean[:, :length], noisy[:, :length]


def doubled(clean: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    """Two streams [B, S, heads, D], each padded to whole tiles, after one another: [B, heads, 2S, D]."""
    num_added = -clean.shape[1] % TILE
    padded = (F.pad(x, (0, 0, 0, 0, 0, num_added)) if num_added else x for x in (clean, noisy))
    return torch.cat(tuple(padded), dim=1).transpose(1, 2)


def mask_function(lengths: torch.Tensor, num_positions: int, block_size: int) -> MaskFunction:
    """The pattern of `diffusion.attention_pattern.block_diffusion_mask`, for single pairs of query and key.

    Args:
        lengths: [B], real tokens. Read when the function runs, so other values need no other kernel.
        num_positions: S.
        block_size: K.
    """

    def attends(sequence: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        query_position, key_position = query % num_positions, key % num_positions
        length = lengths[sequence]
        is_real = (query_position < length) & (key_position < length)
        in_pattern = may_attend(query_position, query >= num_positions, key_position, key >= num_positions, block_size)
        return (in_pattern & is_real) | (query == key)

    return attends


class BlockMasks:
    """The block masks of the last few micro-batches. All layers of a micro-batch use one, and their backwards."""

    def __init__(self, create: Callable[..., BlockMask], tile: tuple[int, int] = (TILE, TILE)) -> None:
        """`create` is `create_block_mask`, compiled or not; `tile` the queries and keys of one."""
        self._create = create
        self._tile = tile
        self._kept: OrderedDict[tuple, tuple[torch.Tensor, BlockMask]] = OrderedDict()

    def get(self, lengths: torch.Tensor, num_positions: int, block_size: int) -> BlockMask:
        """The mask over `2 * num_positions` queries and keys for lengths [B], kept or built.

        The lengths are known by their memory and by how often it was written: comparing their values would wait for
        the GPU. Activation recompute passes another tensor object over the same memory, which finds the same mask.
        """
        count = lengths.shape[0]
        identity = (lengths.device, lengths.data_ptr(), lengths._version, count, num_positions, block_size)
        if identity not in self._kept:
            pattern = mask_function(lengths, num_positions, block_size)
            size = 2 * num_positions
            mask = self._create(pattern, count, None, size, size, device=lengths.device, BLOCK_SIZE=self._tile)
            # The mask holds on to the lengths, so that no other tensor gets their memory while it is kept.
            self._kept[identity] = (lengths, mask)
        self._kept.move_to_end(identity)
        while len(self._kept) > NUM_MASKS_KEPT:
            self._kept.popitem(last=False)
        return self._kept[identity][1]
