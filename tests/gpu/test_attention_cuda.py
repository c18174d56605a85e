"""Every attention backend on a GPU against the float64 oracle: outputs, gradients, leaks, recompute, FP8.

A backend that refuses this GPU or is not installed is skipped with its own reason. Tolerances are those of bfloat16
kernels: relative root mean squares of 6e-3 for outputs and 1e-2 for gradients, and one and a half times what PyTorch's
masked attention has on the same input.
"""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.models.attention import decomposition, local
from megatron_opdlm.models.attention.backend import AttentionCase, Streams, backend_class, build_backend
from tools.benchmark_attention import Sizes, fp8_context, masked_sdpa, transformer_config, update_backward_scales

pytestmark = pytest.mark.gpu
SPECS = ("aten", "aten:fa2", "aten:cudnn", "aten:fa3", "aten:fa4", "flash", "flash:fa2", "te", "flex", "flex:triton")
SIZES = Sizes(batch=2, heads=8, kv_heads=2, head_dim=128)
SHAPES = [(150, 4), (256, 32), (129, 1), (96, 8)]


def layer_of(spec: str, *, fp8: bool = False):
    """One layer of the backend, or a skip with the reason why there is none here."""
    name, _, kernel = spec.partition(":")
    case = AttentionCase(
        device_type="cuda",
        compute_capability=torch.cuda.get_device_capability(),
        dtype=torch.bfloat16,
        head_dim=SIZES.head_dim,
        kernel=kernel or "auto",
        fp8=fp8,
        fp8_recipe="delayed" if fp8 else "off",
    )
    if reason := backend_class(name).refusal(case):
        pytest.skip(f"{spec}: {reason}")
    try:
        backend = build_backend(name, case)
    except ValueError as error:  # a package that does not load, or a cuDNN that is too old
        pytest.skip(str(error))
    return backend.for_layer(transformer_config(SIZES), layer_number=1)


def make_inputs(length: int) -> tuple[Streams, list[torch.Tensor], torch.Tensor]:
    """Streams and output gradients in bfloat16, and lengths with padding; no gradient comes from padded positions."""
    generator = torch.Generator("cuda").manual_seed(0)
    heads = (SIZES.heads, SIZES.kv_heads, SIZES.kv_heads)
    shapes = [(SIZES.batch, length, count, SIZES.head_dim) for count in (*heads, *heads, SIZES.heads, SIZES.heads)]
    tensors = [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes]
    lengths = torch.tensor([length, length - 29], device="cuda")
    return Streams(*tensors[:6]), [grad * is_real(lengths, length) for grad in tensors[6:]], lengths


def is_real(lengths: torch.Tensor, length: int) -> torch.Tensor:
    return (torch.arange(length, device="cuda") < lengths[:, None])[..., None, None]


def attend(layer, streams: Streams, lengths: torch.Tensor, block_size: int):
    return layer.attend(streams, lengths=lengths, block_size=block_size, scale=SIZES.head_dim**-0.5)


def with_gradients(compute, streams: Streams, grads: list[torch.Tensor], lengths: torch.Tensor) -> list[torch.Tensor]:
    """Both outputs, zeroed at padding, and the six gradients."""
    leaves = Streams(*(x.detach().requires_grad_() for x in streams))
    outs = compute(leaves)
    gradients = torch.autograd.grad(outs, leaves, [grad.to(outs[0].dtype) for grad in grads])
    update_backward_scales()
    real = is_real(lengths, streams.query_clean.shape[1])
    return [*(out.detach() * real for out in outs), *gradients]


def relative_errors(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((ours.double() - oracle).norm() / oracle.norm()) for ours, oracle in zip(actual, exact, strict=True)]


def oracle(streams: Streams, grads: list[torch.Tensor], lengths: torch.Tensor, block_size: int) -> list[torch.Tensor]:
    dense = build_backend("dense", AttentionCase(device_type="cuda", dtype=torch.float64))
    exact = Streams(*(x.double() for x in streams))
    return with_gradients(lambda x: attend(dense, x, lengths, block_size), exact, grads, lengths)


@pytest.mark.parametrize(("length", "block_size"), SHAPES)
@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_errors_are_those_of_a_single_masked_kernel(spec, length, block_size):
    layer = layer_of(spec)
    streams, grads, lengths = make_inputs(length)
    exact = oracle(streams, grads, lengths, block_size)
    actual = with_gradients(lambda x: attend(layer, x, lengths, block_size), streams, grads, lengths)
    sizes = Sizes(**{**vars(SIZES), "block_size": block_size})
    whole = torch.full_like(lengths, length)
    single = relative_errors(
        with_gradients(masked_sdpa(sizes), streams, grads, whole), oracle(streams, grads, whole, block_size)
    )
    errors = relative_errors(actual, exact)
    assert max(errors[:2]) <= 6e-3 and max(errors[2:]) <= 1e-2, errors
    assert all(ours <= 1.5 * theirs for ours, theirs in zip(errors, single, strict=True)), (errors, single)


@pytest.mark.parametrize("spec", SPECS)
def test_later_clean_tokens_and_other_noisy_blocks_change_no_bit(spec):
    layer = layer_of(spec)
    streams, _, _ = make_inputs(256)
    lengths = torch.full((SIZES.batch,), 256, device="cuda")
    before = attend(layer, streams, lengths, 4)
    later_clean = Streams(*(x.clone() for x in streams))
    for x in later_clean[:3]:
        x[:, 128:] += 1
    after = attend(layer, later_clean, lengths, 4)
    assert torch.equal(before[0][:, :128], after[0][:, :128]) and torch.equal(before[1][:, :132], after[1][:, :132])
    other_noisy = Streams(*(x.clone() for x in streams))
    for x in other_noisy[3:]:
        x[:, 128:132] += 1
    after = attend(layer, other_noisy, lengths, 4)
    changed = (before[1] != after[1]).flatten(2).any(dim=2)[0].nonzero().flatten().tolist()
    assert torch.equal(before[0], after[0]) and changed == [128, 129, 130, 131]


@pytest.mark.parametrize("spec", SPECS)
def test_recompute_changes_no_gradient(spec):
    layer = layer_of(spec)
    streams, grads, lengths = make_inputs(160)

    def recomputed(x: Streams):
        return torch.utils.checkpoint.checkpoint(
            lambda *tensors: attend(layer, Streams(*tensors), lengths, 4), *x, use_reentrant=False
        )

    plain = with_gradients(lambda x: attend(layer, x, lengths, 4), streams, grads, lengths)
    # Kernels may add up key gradients in another order each time.
    assert max(relative_errors(with_gradients(recomputed, streams, grads, lengths), plain)) <= 1e-3


@pytest.mark.parametrize(("length", "block_size"), SHAPES)
def test_fused_window_is_the_plain_one(length, block_size, monkeypatch):
    pytest.importorskip("triton")
    layer = layer_of("aten:fa2")
    streams, grads, lengths = make_inputs(length)
    fused = with_gradients(lambda x: attend(layer, x, lengths, block_size), streams, grads, lengths)
    monkeypatch.setattr(decomposition, "local_part", lambda device_type: local)
    plain = with_gradients(lambda x: attend(layer, x, lengths, block_size), streams, grads, lengths)
    exact = oracle(streams, grads, lengths, block_size)
    pairs = zip(relative_errors(fused, exact), relative_errors(plain, exact), strict=True)
    assert all(ours <= 1.25 * theirs for ours, theirs in pairs)


def stock_causal_fp8(streams: Streams, grads: list[torch.Tensor]) -> list[float]:
    """Errors of Transformer Engine's own causal FP8 attention on the clean stream: output and three gradients."""
    import transformer_engine.pytorch as te

    attention = te.DotProductAttention(
        SIZES.heads, SIZES.head_dim, num_gqa_groups=SIZES.kv_heads, attention_dropout=0.0, qkv_format="sbhd"
    )
    inputs, grad = [x.transpose(0, 1).contiguous() for x in streams[:3]], grads[0].transpose(0, 1)

    def run(x: list[torch.Tensor], is_fp8: bool) -> list[torch.Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in x]
        with fp8_context(is_fp8):
            out = attention(*leaves, attn_mask_type="causal").view_as(leaves[0])
        gradients = torch.autograd.grad(out, leaves, grad)
        update_backward_scales()
        return [out.detach(), *gradients]

    actual = [run(inputs, True) for _ in range(4)][-1]
    query, key, value = (x.detach().double().transpose(1, 2).requires_grad_() for x in streams[:3])
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    exact = [out.detach(), *torch.autograd.grad(out, (query, key, value), grads[0].double().transpose(1, 2))]
    return relative_errors(actual, [x.permute(2, 0, 1, 3) for x in exact])


def test_fp8_errors_are_those_of_stock_causal_fp8_attention():
    layer = layer_of("te", fp8=True)
    streams, grads, _ = make_inputs(512)
    lengths = torch.full((SIZES.batch,), 512, device="cuda")
    exact = oracle(streams, grads, lengths, 4)

    def compute(x: Streams):
        with fp8_context(True):
            return attend(layer, x, lengths, 4)

    # Delayed scaling needs history: two steps and more before its scales mean something.
    actual = [with_gradients(compute, streams, grads, lengths) for _ in range(4)][-1]
    errors, stock = relative_errors(actual, exact), stock_causal_fp8(streams, grads)
    assert max(errors[:2]) <= 0.10 and max(errors[2:]) <= 0.20, errors
    query_key_value = [max(errors[2 + i], errors[5 + i]) for i in range(3)]
    assert max(errors[:2]) <= 1.25 * stock[0], (errors, stock)
    assert all(ours <= 1.25 * theirs for ours, theirs in zip(query_key_value, stock[1:], strict=True)), (errors, stock)
