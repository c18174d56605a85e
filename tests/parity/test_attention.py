"""Every attention backend against the dense pattern in float64: outputs, gradients, leaks, padding, and mutations.

The oracle is `DenseAttention` in float64 (boolean mask, eager softmax, autograd); the mask itself is tested against
the words of the method in `tests/unit/test_attention_pattern.py`. Each mutation breaks one rule of the fast backend
and has to make the same comparison fail.
"""

from __future__ import annotations

import importlib
import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.diffusion.attention_pattern import block_diffusion_mask
from megatron_opdlm.models.attention import decomposition, local
from megatron_opdlm.models.attention.aten import AtenAttention, CpuFlash
from megatron_opdlm.models.attention.backend import AttentionCase, Streams, build_backend
from megatron_opdlm.models.attention.dense import DenseAttention

LENGTHS = (5, 33, 64, 257, 1000)
BLOCK_SIZES = (1, 4, 8, 16, 32)
TOLERANCES = {torch.float64: (1e-12, 1e-11), torch.float32: (5e-6, 2e-5)}
CPU = AttentionCase(device_type="cpu")
BACKENDS = ("dense", "aten")  # those that run forward and backward on a CPU without another package
DENSE = DenseAttention(CPU)


def make_inputs(lengths, sequence_length, num_heads, num_groups, head_dim, dtype=torch.float64):
    """Query, key, value of the clean, then of the noisy stream, and gradients of the outputs at real tokens only."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), sequence_length)
    heads = (num_heads, num_groups, num_groups, num_heads, num_groups, num_groups, num_heads, num_heads)
    tensors = [torch.randn(*shape, n, head_dim, generator=generator, dtype=torch.float64).to(dtype) for n in heads]
    is_real = is_real_token(lengths, sequence_length)
    return Streams(*tensors[:6]), [grad * is_real for grad in tensors[6:]]


def is_real_token(lengths, sequence_length):
    return (torch.arange(sequence_length) < torch.tensor(lengths)[:, None])[..., None, None]


def attend(backend, streams, lengths, block_size):
    lengths = torch.tensor(lengths)
    return backend.attend(streams, lengths=lengths, block_size=block_size, scale=streams[0].shape[-1] ** -0.5)


def attend_with_gradients(backend, streams, grads, lengths, block_size):
    """Both outputs, zeroed at padding, and the gradients of the six inputs."""
    leaves = Streams(*(x.detach().requires_grad_() for x in streams))
    outs = attend(backend, leaves, lengths, block_size)
    gradients = torch.autograd.grad(outs, leaves, grads)
    assert all(x.isfinite().all() and x.dtype == streams[0].dtype for x in (*outs, *gradients))
    is_real = is_real_token(lengths, leaves[0].shape[1])
    return [out.detach() * is_real for out in outs], list(gradients)


def largest_error(actual, expected):
    return max((a.double() - e).abs().max().item() for a, e in zip(actual, expected, strict=True))


def errors_against_oracle(backend, lengths, sequence_length, block_size, heads=(4, 2), dtype=torch.float64):
    """Largest absolute error of outputs and of gradients; the oracle gets the same rounded inputs in float64."""
    streams, grads = make_inputs(lengths, sequence_length, *heads, 8, dtype)
    actual = attend_with_gradients(backend, streams, grads, lengths, block_size)
    exact = (Streams(*(x.double() for x in streams)), [x.double() for x in grads])
    expected = attend_with_gradients(DENSE, *exact, lengths, block_size)
    return tuple(largest_error(*pair) for pair in zip(actual, expected, strict=True))


def assert_exact(backend, lengths, sequence_length, block_size, **kwargs):
    out_error, grad_error = errors_against_oracle(backend, lengths, sequence_length, block_size, **kwargs)
    out_tolerance, grad_tolerance = TOLERANCES[kwargs.get("dtype", torch.float64)]
    assert out_error <= out_tolerance, f"outputs differ by {out_error}"
    assert grad_error <= grad_tolerance, f"gradients differ by {grad_error}"


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("sequence_length", "block_size"), [(12, 4), (13, 4), (3, 4), (8, 1), (10, 5)])
def test_backend_attends_exactly_the_pattern(name, sequence_length, block_size):
    lengths = [sequence_length, sequence_length - 2]
    # Zero queries weigh all attended keys alike, and unit vectors as values show which ones they were.
    query = torch.zeros(2, sequence_length, 1, 2 * sequence_length)
    identity = torch.eye(2 * sequence_length).view(1, 2 * sequence_length, 1, -1).expand(2, -1, -1, -1)
    clean, noisy = identity.chunk(2, dim=1)
    streams = Streams(query, query, clean, query, query, noisy)
    outs = attend(build_backend(name, CPU), streams, lengths, block_size)
    attended = torch.cat(outs, dim=1)[:, :, 0]
    mask = block_diffusion_mask(torch.tensor(lengths), sequence_length, block_size)
    is_real = is_real_token(lengths, sequence_length)[:, :, 0].repeat(1, 2, 1)
    torch.testing.assert_close(attended * is_real, mask / mask.sum(dim=-1, keepdim=True) * is_real)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", [(2, 2), (2, 1), (8, 1)])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("sequence_length", LENGTHS)
def test_aten_matches_dense_float64(sequence_length, block_size, heads, dtype):
    lengths = [sequence_length, sequence_length - 1, sequence_length // 2 + 1][: 3 if sequence_length < 1000 else 2]
    assert_exact(AtenAttention(CPU), lengths, sequence_length, block_size, heads=heads, dtype=dtype)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), sequence_length=st.integers(1, 24), block_size=st.integers(1, 9))
def test_aten_matches_dense_float64_on_any_shape(data, sequence_length, block_size):
    lengths = data.draw(st.lists(st.integers(1, sequence_length), min_size=1, max_size=3))
    num_groups, heads_per_group = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    heads = (num_groups * heads_per_group, num_groups)
    assert_exact(AtenAttention(CPU), lengths, sequence_length, block_size, heads=heads)


def masked_sdpa(streams, lengths, block_size):
    """PyTorch's own attention under the dense mask, in the input's precision: the error to compare with."""
    query, key, value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(streams[:3], streams[3:], strict=True))
    mask = block_diffusion_mask(torch.tensor(lengths), streams[0].shape[1], block_size)[:, None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).chunk(2, dim=1)


def test_bfloat16_errors_are_those_of_a_single_masked_kernel():
    lengths, length, block_size = [192, 131], 192, 8
    streams, grads = make_inputs(lengths, length, 4, 2, 64, torch.bfloat16)
    exact = (Streams(*(x.double() for x in streams)), [x.double() for x in grads])
    expected = attend_with_gradients(DENSE, *exact, lengths, block_size)
    actual = attend_with_gradients(AtenAttention(CPU), streams, grads, lengths, block_size)
    leaves = Streams(*(x.detach().requires_grad_() for x in streams))
    outs = masked_sdpa(leaves, lengths, block_size)
    is_real = is_real_token(lengths, length)
    single = ([out * is_real for out in outs], torch.autograd.grad(outs, leaves, grads))

    def relative_rmse(tensors, references):
        pairs = zip(tensors, references, strict=True)
        return [((x.double() - ref).square().mean() / ref.square().mean()).sqrt().item() for x, ref in pairs]

    for part, limit in ((0, 6e-3), (1, 1e-2)):
        ours, theirs = relative_rmse(actual[part], expected[part]), relative_rmse(single[part], expected[part])
        assert max(ours) <= limit
        assert all(our <= 1.5 * their for our, their in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("name", BACKENDS)
def test_blocks_of_one_are_causal_attention_with_the_token_itself_replaced(name):
    (query, key, value, noisy_query, noisy_key, noisy_value), _ = make_inputs([9], 9, 2, 2, 8)
    streams = Streams(query, key, value, noisy_query, noisy_key, noisy_value)
    out_clean, out_noisy = attend(build_backend(name, CPU), streams, [9], 1)
    causal = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), is_causal=True)
    torch.testing.assert_close(out_clean, causal.transpose(1, 2), rtol=0, atol=1e-12)
    for i in range(9):
        keys, values = (torch.cat((x[:, :i], y[:, i : i + 1]), 1) for x, y in ((key, noisy_key), (value, noisy_value)))
        alone = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (noisy_query[:, i : i + 1], keys, values)))
        torch.testing.assert_close(out_noisy[:, i : i + 1], alone.transpose(1, 2), rtol=0, atol=1e-12)


# --- leaks and padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_later_clean_tokens_change_no_bit_of_a_noisy_block(name):
    streams, _ = make_inputs([24], 24, 4, 2, 16, torch.bfloat16)
    changed = Streams(*(x.clone() for x in streams))
    for x in changed[:3]:
        x[:, 8:] += 1  # from block 2 of 4 on
    before, after = (attend(build_backend(name, CPU), x, [24], 4) for x in (streams, changed))
    assert torch.equal(before[0][:, :8], after[0][:, :8])
    assert torch.equal(before[1][:, :12], after[1][:, :12])
    assert not torch.equal(before[1][:, 12:16], after[1][:, 12:16])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_noisy_block_changes_no_bit_of_anything_else(name):
    streams, _ = make_inputs([24], 24, 4, 2, 16, torch.bfloat16)
    changed = Streams(*(x.clone() for x in streams))
    for x in changed[3:]:
        x[:, 8:12] += 1
    before, after = (attend(build_backend(name, CPU), x, [24], 4) for x in (streams, changed))
    is_changed = (before[1] != after[1]).any(dim=-1).any(dim=-1)[0]
    assert torch.equal(before[0], after[0])
    assert is_changed.nonzero().flatten().tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_of_a_noisy_block_reach_only_what_it_attends(name):
    streams, _ = make_inputs([20], 20, 4, 2, 8)
    leaves = Streams(*(x.requires_grad_() for x in streams))
    _, out_noisy = attend(build_backend(name, CPU), leaves, [20], 4)
    gradients = torch.autograd.grad(
        out_noisy[:, 8:12].square().sum(), leaves, allow_unused=True, materialize_grads=True
    )
    reached = [[i for i in range(20) if gradient[:, i].any()] for gradient in gradients]
    assert reached == [[], list(range(8)), list(range(8)), *[[8, 9, 10, 11]] * 3]


@pytest.mark.parametrize("name", BACKENDS)
def test_padding_changes_neither_outputs_nor_gradients(name):
    backend = build_backend(name, CPU)
    streams, grads = make_inputs([10], 10, 4, 2, 8)
    padded = Streams(*(F.pad(x, (0, 0, 0, 0, 0, 7), value=3.0) for x in streams))
    padded_grads = [F.pad(x, (0, 0, 0, 0, 0, 7)) for x in grads]
    outs, gradients = attend_with_gradients(backend, streams, grads, [10], 4)
    padded_outs, padded_gradients = attend_with_gradients(backend, padded, padded_grads, [10], 4)
    assert largest_error([x[:, :10] for x in padded_outs], outs) <= 1e-12
    assert largest_error([x[:, :10] for x in padded_gradients], gradients) <= 1e-12
    assert not any(x[:, 10:].any() for x in padded_gradients)


# --- mutations: each must make the comparison fail -------------------------------------------------------------------


def keep_wrong_offset(shift):
    def mutate(monkeypatch):
        original = local.seen_by_kernel
        monkeypatch.setattr(local, "seen_by_kernel", lambda query, key, size: original(query, key, size + shift))

    return mutate


def shift_queries_wrongly(shift):
    """The kernel gives a query at position `i` the clean keys up to `i - K - shift`."""

    def mutate(monkeypatch):
        original = decomposition.kernel_inputs

        def mutated(streams, block_size):
            query, key, value = original(streams, block_size)
            return query, key.roll(shift, dims=1), value.roll(shift, dims=1)

        monkeypatch.setattr(decomposition, "kernel_inputs", mutated)

    return mutate


def let_noisy_see_its_own_clean_block(monkeypatch):
    original = local.to_windows
    monkeypatch.setattr(local, "to_windows", lambda clean, noisy, size: original(clean, clean, size))


def let_clean_see_noisy(monkeypatch):
    original = local.to_windows

    def mutated(clean, noisy, block_size):
        windows = original(clean, noisy, block_size)
        windows[:, :, :, 0, block_size:] = windows[:, :, :, 1, block_size:]
        return windows

    monkeypatch.setattr(local, "to_windows", mutated)


def order_heads_by_stream(monkeypatch):
    """(stream, group, head) instead of (group, stream, head), consistently on the way in and out."""
    original = local.kernel_to_rows

    def reordered_rows(stacked, num_groups, block_size):
        clean, noisy = stacked.chunk(2, dim=2)
        return original(stack(clean, noisy, num_groups), num_groups, block_size)

    stack = decomposition.stack_heads
    monkeypatch.setattr(decomposition, "stack_heads", lambda clean, noisy, _: torch.cat((clean, noisy), dim=2))
    monkeypatch.setattr(local, "kernel_to_rows", reordered_rows)


def attend_padding(monkeypatch):
    original = local.hidden_in_window
    monkeypatch.setattr(local, "hidden_in_window", lambda lengths, *rest: original(torch.full_like(lengths, 99), *rest))


MUTATIONS = {
    "one key twice": keep_wrong_offset(1),
    "one key missing": keep_wrong_offset(-1),
    "shift of K + 1": shift_queries_wrongly(1),
    "shift of K - 1": shift_queries_wrongly(-1),
    "noisy sees its own clean block": let_noisy_see_its_own_clean_block,
    "clean sees noisy": let_clean_see_noisy,
    "heads in the order stream, group": order_heads_by_stream,
    "padding attended in the last block": attend_padding,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_rule_fails_the_comparison(mutation, monkeypatch):
    case = {"lengths": [14, 9], "sequence_length": 16, "block_size": 4}
    assert_exact(AtenAttention(CPU), **case)
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises(AssertionError, match="outputs differ by"):
        assert_exact(AtenAttention(CPU), **case)


class UnmergedKernel(CpuFlash):
    """Its backward gets its own output or log-sum-exp back instead of the merged one."""

    def __init__(self, unmerged):
        self.unmerged = unmerged

    def forward(self, *args):
        self.out, self.lse = super().forward(*args)
        return self.out, self.lse

    def backward(self, grad_out, query, key, value, out, lse, scale):
        out = self.out if "out" in self.unmerged else out
        lse = self.lse if "lse" in self.unmerged else lse
        return super().backward(grad_out, query, key, value, out, lse, scale)


@pytest.mark.parametrize("unmerged", [("out",), ("lse",), ("out", "lse")])
def test_unmerged_statistics_in_the_backward_leave_the_forward_right_and_the_gradients_wrong(unmerged):
    backend = AtenAttention(CPU)
    backend.kernel = UnmergedKernel(unmerged)
    out_error, grad_error = errors_against_oracle(backend, [14, 9], 16, 4)
    assert out_error <= 1e-12
    assert grad_error > 1e-2


# --- choosing a backend ----------------------------------------------------------------------------------------------


def test_unknown_backend_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"attention\.backend \(flesh\) must be one of auto, dense, aten"):
        build_backend("flesh", CPU)


def test_auto_takes_aten_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        assert isinstance(build_backend("auto", CPU), AtenAttention)
    assert "aten on cpu" in caplog.text


def test_only_the_chosen_backend_is_imported(monkeypatch):
    imported = []
    import_module = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: imported.append(name) or import_module(name))
    build_backend("dense", CPU)
    assert imported == ["megatron_opdlm.models.attention.dense"]
