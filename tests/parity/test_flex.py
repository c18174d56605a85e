"""FlexAttention as far as a CPU runs it: its mask bit by bit, its forward pass uncompiled, and the cache of masks.

The backward pass and the compiled kernels need a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as flex_module
from torch.torch_version import TorchVersion

from megatron_opdlm.diffusion.attention_pattern import block_diffusion_mask
from megatron_opdlm.models.attention import flex
from megatron_opdlm.models.attention.flex import BlockMasks, FlexAttention, flex_attend, mask_function
from tests.parity.test_attention import DENSE, attend, is_real_token, make_inputs
from tests.parity.test_attention_cuda_kernels import assert_refused, case


def dense_mask(pattern, count, size):
    sequence, query, key = torch.arange(count)[:, None, None], torch.arange(size)[:, None], torch.arange(size)
    return pattern(sequence, torch.tensor(0), query, key)


@pytest.mark.parametrize(("length", "block_size"), [(12, 4), (13, 4), (7, 1), (8, 8), (5, 9), (33, 32)])
def test_the_mask_is_the_pattern_bit_by_bit(length, block_size):
    lengths = torch.tensor([length, length // 2, 1])
    mask = dense_mask(mask_function(lengths, length, block_size), 3, 2 * length)
    assert torch.equal(mask, block_diffusion_mask(lengths, length, block_size))


def test_tiles_that_nothing_attends_are_left_out():
    lengths = torch.tensor([300])
    mask = BlockMasks(flex_module.create_block_mask).get(lengths, 384, 4)
    tiles = mask.to_dense()[0, 0]
    pattern = block_diffusion_mask(lengths, 384, 4)[0].unflatten(0, (6, 128)).unflatten(2, (6, 128))
    assert torch.equal(tiles.bool(), pattern.any(dim=3).any(dim=1))
    assert tiles.sum() < 18, "clean to clean and noisy to clean are triangles, noisy to noisy a diagonal"


@pytest.fixture
def uncompiled(monkeypatch):
    """`flex_attention` computes with plain PyTorch."""
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return flex_module.flex_attention


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
@pytest.mark.parametrize(("length", "block_size"), [(12, 4), (130, 8), (33, 5)])
def test_forward_matches_dense_float64(length, block_size, heads, uncompiled):
    lengths = [length, length - 5]
    streams, _ = make_inputs(lengths, length, *heads, 16)
    masks = BlockMasks(flex_module.create_block_mask)
    outs = flex_attend(streams, torch.tensor(lengths), block_size, 0.25, uncompiled, masks)
    is_real = is_real_token(lengths, length)
    for out, expected in zip(outs, attend(DENSE, streams, lengths, block_size), strict=True):
        assert out.shape == expected.shape
        torch.testing.assert_close(out * is_real, expected * is_real, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("length", "size"), [(5, 256), (128, 256), (130, 512)])
def test_each_stream_is_padded_to_whole_tiles(length, size):
    clean, noisy = torch.ones(1, length, 2, 8), torch.full((1, length, 2, 8), 2.0)
    both = flex.doubled(clean, noisy)
    assert both.shape == (1, 2, size, 8)
    assert both[0, 0, [0, length - 1, size // 2, size // 2 + length - 1], 0].tolist() == [1, 1, 2, 2]


def test_a_pattern_with_another_block_size_fails_the_comparison(uncompiled):
    streams, _ = make_inputs([12], 12, 2, 2, 16)
    masks = BlockMasks(flex_module.create_block_mask)
    outs = flex_attend(streams, torch.tensor([12]), 6, 0.25, uncompiled, masks)
    expected = attend(DENSE, streams, [12], 4)
    assert all((out - exact).abs().max() > 1e-2 for out, exact in zip(outs, expected, strict=True))


# --- one mask for each micro-batch -----------------------------------------------------------------------------------


def counting(built):
    def create(pattern, count, heads, num_queries, num_keys, *, device, BLOCK_SIZE):
        built.append((count, heads, num_queries, num_keys, BLOCK_SIZE))
        return dense_mask(pattern, count, num_queries)

    return create


def test_a_mask_is_built_once_and_found_again_by_recompute():
    built = []
    masks = BlockMasks(counting(built))
    lengths = torch.tensor([5, 9])
    first = masks.get(lengths, 16, 4)
    assert masks.get(lengths, 16, 4) is first
    assert masks.get(lengths.detach(), 16, 4) is first
    assert built == [(2, None, 32, 32, (128, 128))]


def test_other_lengths_sizes_and_blocks_get_another_mask():
    built = []
    masks = BlockMasks(counting(built))
    lengths = torch.tensor([5, 9])
    first = masks.get(lengths, 16, 4)
    masks.get(lengths, 16, 8)
    masks.get(lengths, 32, 4)
    masks.get(lengths[:1], 16, 4)
    lengths += 1
    last = masks.get(lengths, 16, 4)
    assert len(built) == 5
    assert not torch.equal(first, last)


def test_kept_masks_are_few_and_hold_on_to_their_lengths():
    built = []
    masks = BlockMasks(counting(built))
    for value in range(1, 30):
        lengths = torch.tensor([value])  # freed memory would be given to the next one
        assert torch.equal(masks.get(lengths, 32, 4), block_diffusion_mask(torch.tensor([value]), 32, 4))
    assert len(built) == 29
    assert len(masks._kept) == flex.NUM_MASKS_KEPT


def test_the_mask_used_last_is_kept():
    built = []
    masks = BlockMasks(counting(built))
    kept = torch.tensor([3])
    for value in range(20):
        masks.get(torch.tensor([value]), 8, 4)
        masks.get(kept, 8, 4)
    assert built.count((1, None, 16, 16, (128, 128))) == 21


# --- what it is built for --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def recompile_limit():
    """What building the backend raises for the whole process."""
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def test_the_backend_for_an_h100_is_built_without_one():
    backend = FlexAttention(case(kernel="triton"))
    assert backend._attend.keywords == {"kernel_options": {"BACKEND": "TRITON"}}
    assert torch._dynamo.config.recompile_limit == flex.RECOMPILE_LIMIT


def test_auto_leaves_the_kernel_to_pytorch():
    assert FlexAttention(case())._attend.keywords == {"kernel_options": None}


@pytest.mark.parametrize(
    ("changes", "tile"),
    [({}, (128, 128)), ({"kernel": "fa4"}, (128, 128)), ({"kernel": "fa4", "compute_capability": (10, 0)}, (256, 128))],
)
def test_tiles_have_the_shape_that_the_kernel_takes(changes, tile):
    assert flex.tile_shape(case(**changes)) == tile


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_type": "cpu", "compute_capability": None}, "FlexAttention has no backward on a CPU"),
        ({"fp8": True}, r"attention\.fp8 \(true\) needs attention\.backend te"),
        ({"compute_capability": (7, 5)}, r"compute capability \(7\.5\) must be at least 8\.0"),
        ({"kernel": "fa2"}, r"attention\.kernel \(fa2\) must be one of auto, triton, fa4"),
        ({"dtype": torch.float64}, r"precision\.dtype \(torch\.float64\) must be bfloat16, float16 or float32"),
        ({"head_dim": 8}, r"head_dim \(8\) must be at least 16"),
        ({"kernel": "fa4", "dtype": torch.float32}, r"precision\.dtype \(torch\.float32\) must be bfloat16 or float16"),
        ({"kernel": "fa4", "head_dim": 192}, r"head_dim \(192\) must be a multiple of 8 and at most 128"),
        ({"kernel": "fa4", "compute_capability": (8, 0)}, r"needs compute capability 9\.x or 10\.x, the GPU has 8\.0"),
        ({"kernel": "fa4"}, r"attention\.kernel \(fa4\) needs the package flash-attn-4"),
    ],
)
def test_flex_says_what_it_cannot_serve(changes, reason, monkeypatch):
    monkeypatch.setattr(flex, "is_installed", lambda name: False)
    assert_refused(FlexAttention, case(**changes), reason)


def test_flex_serves_a_hopper_gpu_and_odd_heads_with_triton(monkeypatch):
    monkeypatch.setattr(flex, "is_installed", lambda name: True)
    served = ({}, {"kernel": "fa4"}, {"head_dim": 80, "dtype": torch.float32}, {"kernel": "triton"})
    assert [FlexAttention.refusal(case(**changes)) for changes in served] == [None] * 4


def test_flex_refuses_an_old_pytorch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.5.1"))
    assert FlexAttention.refusal(case()) == "PyTorch (2.5.1) must be at least 2.6"


def test_fa4_needs_a_flex_attention_that_can_choose(monkeypatch):
    monkeypatch.delattr(flex_module, "FlexKernelOptions")
    assert "needs a PyTorch whose FlexAttention has the option BACKEND" in FlexAttention.refusal(case(kernel="fa4"))
    assert FlexAttention(case(kernel="triton"))._attend.keywords == {"kernel_options": None}
