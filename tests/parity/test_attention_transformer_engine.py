"""The backend `te` over a fake of Transformer Engine, against the dense pattern in float64 and stock causal attention.

The fake has the structure of the real package and saves for its backward only what the spliced kernel returns. An
identity quantizer makes the quantized path exact, so that only number formats separate it from FP8. Each mutation
breaks one rule and has to show in the gradients alone, or in everything.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.transformer import TransformerConfig
from torch.utils.checkpoint import checkpoint

from megatron_opdlm.models.attention import transformer_engine_nodes as nodes
from megatron_opdlm.models.attention import transformer_engine_splice as splice
from megatron_opdlm.models.attention.backend import AttentionCase, Streams
from megatron_opdlm.models.attention.core_attention import BlockDiffusionCoreAttention
from megatron_opdlm.models.attention.dense import DenseAttention
from megatron_opdlm.models.attention.transformer_engine import TransformerEngineAttention
from tests.fake_transformer_engine import FakeTransformerEngine, Float8Quantizer, IdentityQuantizer

HOPPER = AttentionCase(device_type="cuda", compute_capability=(9, 0), dtype=torch.bfloat16, head_dim=128)
HOPPER_FP8 = dataclasses.replace(HOPPER, fp8=True, fp8_recipe="delayed")
DENSE = DenseAttention(AttentionCase(device_type="cpu"))
TOLERANCES = {torch.float64: (1e-12, 1e-11), torch.float32: (5e-6, 2e-5)}


def transformer_config(heads, head_dim=8, **kwargs):
    num_heads, num_groups = heads
    return TransformerConfig(
        num_layers=1,
        hidden_size=num_heads * head_dim,
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        kv_channels=head_dim,
        **kwargs,
    )


def build_layer(monkeypatch, fake, heads=(4, 2), head_dim=8, case=HOPPER, **kwargs):
    fake.installed(monkeypatch)
    return TransformerEngineAttention(case).for_layer(transformer_config(heads, head_dim, **kwargs), layer_number=1)


def is_real_token(lengths, length):
    return (torch.arange(length) < torch.tensor(lengths)[:, None])[..., None, None]


def make_inputs(lengths, length, heads, head_dim=8, dtype=torch.float64):
    """Six inputs as Megatron has them, views of [S, 2B, heads, D]; gradients of both outputs at real tokens only."""
    generator = torch.Generator().manual_seed(0)
    num_heads, num_groups = heads

    def two_streams(num_heads):
        shape = (length, 2 * len(lengths), num_heads, head_dim)
        both = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return both.transpose(0, 1).chunk(2)

    clean, noisy = zip(*(two_streams(n) for n in (num_heads, num_groups, num_groups)), strict=True)
    grads = [grad * is_real_token(lengths, length) for grad in two_streams(num_heads)]
    return Streams(*clean, *noisy), grads


def attend_with_gradients(layer, streams, grads, lengths, block_size):
    """Both outputs, zeroed at padding, and the gradients of the six inputs."""
    leaves = Streams(*(x.detach().requires_grad_() for x in streams))
    scale = streams.query_clean.shape[3] ** -0.5
    outs = layer.attend(leaves, lengths=torch.tensor(lengths), block_size=block_size, scale=scale)
    gradients = torch.autograd.grad(outs, leaves, grads)
    assert all(x.isfinite().all() and x.dtype == streams[0].dtype for x in (*outs, *gradients))
    return [out.detach() * is_real_token(lengths, out.shape[1]) for out in outs], list(gradients)


def largest_error(actual, expected):
    return max((a.double() - e).abs().max().item() for a, e in zip(actual, expected, strict=True))


def errors_against_oracle(layer, lengths, length, block_size, heads=(4, 2), dtype=torch.float64):
    streams, grads = make_inputs(lengths, length, heads, dtype=dtype)
    actual = attend_with_gradients(layer, streams, grads, lengths, block_size)
    exact = Streams(*(x.double() for x in streams)), [x.double() for x in grads]
    expected = attend_with_gradients(DENSE, *exact, lengths, block_size)
    return tuple(largest_error(*pair) for pair in zip(actual, expected, strict=True))


def assert_exact(layer, lengths, length, block_size, heads=(4, 2), dtype=torch.float64):
    out_error, grad_error = errors_against_oracle(layer, lengths, length, block_size, heads, dtype)
    out_tolerance, grad_tolerance = TOLERANCES[dtype]
    assert out_error <= out_tolerance, f"outputs differ by {out_error}"
    assert grad_error <= grad_tolerance, f"gradients differ by {grad_error}"


def relative_rmse(actual, expected):
    pairs = zip(actual, expected, strict=True)
    return [((a.double() - e).square().mean() / e.square().mean()).sqrt().item() for a, e in pairs]


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", [(2, 2), (2, 1), (8, 1)])
@pytest.mark.parametrize("block_size", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("length", [5, 33, 64, 257])
def test_outputs_and_gradients_match_dense_float64(monkeypatch, length, block_size, heads, dtype):
    layer = build_layer(monkeypatch, FakeTransformerEngine(), heads)
    assert_exact(layer, [length, length - 1, length // 2 + 1], length, block_size, heads, dtype)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(), length=st.integers(1, 24), block_size=st.integers(1, 9), release=st.sampled_from(["2.9", "2.20"])
)
def test_any_shape_matches_dense_float64(monkeypatch, data, length, block_size, release):
    lengths = data.draw(st.lists(st.integers(1, length), min_size=1, max_size=3))
    num_groups, heads_per_group = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    quantizer_class = data.draw(st.sampled_from([None, IdentityQuantizer]))
    heads = (num_groups * heads_per_group, num_groups)
    layer = build_layer(monkeypatch, FakeTransformerEngine(release, quantizer_class), heads)
    assert_exact(layer, lengths, length, block_size, heads)


@pytest.mark.parametrize("quantizer_class", [None, IdentityQuantizer])
@pytest.mark.parametrize("release", ["2.9", "2.20"])
def test_both_layouts_of_the_statistics_and_the_quantized_path_are_exact(monkeypatch, release, quantizer_class):
    layer = build_layer(monkeypatch, FakeTransformerEngine(release, quantizer_class))
    for _ in range(2):
        assert_exact(layer, [14, 9], 16, 4)


def test_bfloat16_rounds_like_a_single_kernel(monkeypatch):
    layer = build_layer(monkeypatch, FakeTransformerEngine(), (4, 2), head_dim=64)
    streams, grads = make_inputs([192, 131], 192, (4, 2), 64, torch.bfloat16)
    exact = Streams(*(x.double() for x in streams)), [x.double() for x in grads]
    outs, gradients = attend_with_gradients(layer, streams, grads, [192, 131], 8)
    expected_outs, expected_gradients = attend_with_gradients(DENSE, *exact, [192, 131], 8)
    assert max(relative_rmse(outs, expected_outs)) <= 6e-3
    assert max(relative_rmse(gradients, expected_gradients)) <= 1e-2


def causal_errors(fake, streams, grad):
    """Relative errors of the same fake's causal attention in FP8 over the clean stream: the output, dq, dk, dv."""
    query, key, value = streams[:3]
    attention = fake.modules["transformer_engine.pytorch"].DotProductAttention(
        query.shape[2], query.shape[3], key.shape[2], softmax_scale=query.shape[3] ** -0.5
    )
    inputs = [x.detach().transpose(0, 1).contiguous().requires_grad_() for x in (query, key, value)]
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    heads = (x.transpose(1, 2) for x in leaves)
    exact = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    expected = torch.autograd.grad(exact, leaves, grad.double())
    for _ in range(2):
        out = attention(*inputs).unflatten(2, query.shape[2:])
        gradients = torch.autograd.grad(out, inputs, grad.transpose(0, 1))
        for quantizer in attention.quantizers.values():
            quantizer.update_scale()
    back = [x.transpose(0, 1) for x in (out, *gradients)]
    return relative_rmse(back, [exact, *expected])


def test_fp8_errs_no_more_than_causal_fp8_attention(monkeypatch):
    fake = FakeTransformerEngine(quantizer_class=Float8Quantizer)
    layer = build_layer(monkeypatch, fake, head_dim=128, case=HOPPER_FP8)
    streams, grads = make_inputs([128, 97], 128, (4, 2), 128, torch.bfloat16)
    for _ in range(2):  # the second time with the scales that the first time's maxima give
        outs, gradients = attend_with_gradients(layer, streams, grads, [128, 97], 8)
        for quantizer in layer.attention.quantizers.values():
            quantizer.update_scale()
    exact = Streams(*(x.double() for x in streams)), [x.double() for x in grads]
    expected_outs, expected_gradients = attend_with_gradients(DENSE, *exact, [128, 97], 8)
    out_errors = relative_rmse(outs, expected_outs)
    grad_errors = relative_rmse(gradients, expected_gradients)
    causal = causal_errors(fake, streams, grads[0])
    assert 1e-2 < max(out_errors) <= 0.10 and max(grad_errors) <= 0.20
    assert max(out_errors) <= 1.25 * causal[0]
    for error, stock in zip(grad_errors, causal[1:] * 2, strict=True):
        assert error <= 1.25 * stock


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("quantizer_class", [None, Float8Quantizer])
def test_recompute_gives_the_same_outputs_and_gradients(monkeypatch, use_reentrant, quantizer_class):
    layer = build_layer(monkeypatch, FakeTransformerEngine(quantizer_class=quantizer_class))
    streams, grads = make_inputs([14, 9], 16, (4, 2), dtype=torch.float32)
    stock = attend_with_gradients(layer, streams, grads, [14, 9], 4)

    def attend(*tensors):
        return layer.attend(Streams(*tensors), lengths=torch.tensor([14, 9]), block_size=4, scale=8**-0.5)

    leaves = [x.detach().requires_grad_() for x in streams]
    outs = checkpoint(attend, *leaves, use_reentrant=use_reentrant)
    torch.autograd.backward(outs, grads)
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, stock[1], strict=True))
    is_real = is_real_token([14, 9], 16)
    assert all(torch.equal(out * is_real, expected) for out, expected in zip(outs, stock[0], strict=True))


def test_a_loss_on_the_noisy_stream_alone_reaches_all_inputs(monkeypatch):
    layer = build_layer(monkeypatch, FakeTransformerEngine())
    streams, (_, grad) = make_inputs([16], 16, (4, 2))
    by_backend = []
    for backend in (layer, DENSE):
        leaves = Streams(*(x.detach().requires_grad_() for x in streams))
        _, out = backend.attend(leaves, lengths=torch.tensor([16]), block_size=4, scale=8**-0.5)
        by_backend.append(torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True))
    assert largest_error(*by_backend) <= 1e-11


def test_no_graph_is_built_without_gradients(monkeypatch):
    layer = build_layer(monkeypatch, FakeTransformerEngine())
    streams, _ = make_inputs([14, 9], 16, (4, 2))
    leaves = Streams(*(x.detach().requires_grad_() for x in streams))
    with torch.no_grad():
        outs = layer.attend(leaves, lengths=torch.tensor([14, 9]), block_size=4, scale=8**-0.5)
    expected = DENSE.attend(streams, lengths=torch.tensor([14, 9]), block_size=4, scale=8**-0.5)
    assert not any(out.requires_grad for out in outs)
    is_real = is_real_token([14, 9], 16)
    assert largest_error([out * is_real for out in outs], [x * is_real for x in expected]) <= 1e-12


def test_queries_and_outputs_are_kept_once(monkeypatch):
    num_heads, num_groups, head_dim, length, block_size = 8, 1, 8, 128, 4
    layer = build_layer(monkeypatch, FakeTransformerEngine(), (num_heads, num_groups), head_dim)
    streams, _ = make_inputs([length], length, (num_heads, num_groups), head_dim, torch.float32)
    leaves = Streams(*(x.detach().requires_grad_() for x in streams))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.attend(leaves, lengths=torch.tensor([length]), block_size=block_size, scale=8**-0.5)
    query_bytes, key_bytes = (4 * 2 * length * n * head_dim for n in (num_heads, num_groups))
    statistics_bytes = 2 * 4 * 2 * num_heads * length
    # Queries and outputs; keys and values of both streams, and of one in the kernel's layout; two log-sum-exps.
    assert sum(kept.values()) <= 2 * query_bytes + 3 * key_bytes + statistics_bytes + 1024


# --- mutations: each must make the comparison fail -------------------------------------------------------------------


@pytest.mark.parametrize("unmerged", ["out", "lse"])
@pytest.mark.parametrize("quantizer_class", [None, IdentityQuantizer])
def test_unmerged_statistics_leave_the_forward_right_and_the_gradients_wrong(monkeypatch, unmerged, quantizer_class):
    layer = build_layer(monkeypatch, FakeTransformerEngine(quantizer_class=quantizer_class))
    merged_result = splice.merged_result

    def mutated(out, statistics, *rest):
        merged_out, merged_statistics = merged_result(out, statistics, *rest)
        return (out, merged_statistics) if unmerged == "out" else (merged_out, statistics)

    monkeypatch.setattr(splice, "merged_result", mutated)
    out_error, grad_error = errors_against_oracle(layer, [14, 9], 16, 4)
    assert out_error <= 1e-12
    assert grad_error > 1e-2


def test_heads_ordered_by_stream_before_group_fail_the_comparison(monkeypatch):
    layer = build_layer(monkeypatch, FakeTransformerEngine())
    assert_exact(layer, [14, 9], 16, 4)
    monkeypatch.setattr(nodes, "stack_heads", lambda clean, noisy, _: torch.cat((clean, noisy), dim=2))
    with pytest.raises(AssertionError, match="outputs differ by"):
        assert_exact(layer, [14, 9], 16, 4)


# --- the splice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_amax", [0.5, 8.0])
def test_the_larger_maximum_of_kernel_and_merged_output_is_kept(kernel_amax):
    quantizer = Float8Quantizer(torch.float8_e4m3fn)
    quantizer.amax.fill_(kernel_amax)
    amax = quantizer.amax
    quantized = splice.quantized_again(torch.tensor([1.0, -2.0]), quantizer)
    assert quantizer.amax is amax and amax.item() == max(kernel_amax, 2.0)
    assert quantized.dequantize().tolist() == [1.0, -2.0]


@pytest.mark.parametrize("num_log_sum_exps", [1, 2])
def test_every_place_of_the_statistics_but_the_random_states_holds_the_merged_log_sum_exp(num_log_sum_exps):
    out, lse, random_state = torch.zeros(3, 2, 4, 8), torch.zeros(2, 4, 3, 1), torch.zeros(2, dtype=torch.int64)
    statistics = [lse] * num_log_sum_exps + [random_state]
    merged_out, merged = splice.merged_result(out, statistics, None, out.shape, lambda out, lse: (out + 1, lse + 2))
    assert torch.equal(merged_out, out + 1)
    assert len(merged) == num_log_sum_exps + 1 and merged[-1] is random_state
    assert all(torch.equal(x, lse + 2) and x.is_contiguous() for x in merged[:-1])


def names_and_selection(fake):
    return fake.backends.fused_attn_fwd, fake.utils.get_attention_backend, dict(fake.front._attention_backends)


def test_everything_is_restored_after_a_call_and_after_an_error(monkeypatch):
    fake = FakeTransformerEngine()
    layer = build_layer(monkeypatch, fake)
    streams, grads = make_inputs([14, 9], 16, (4, 2))
    before = names_and_selection(fake)
    attend_with_gradients(layer, streams, grads, [14, 9], 4)
    assert names_and_selection(fake) == before

    def failing_kernel(*args, **kwargs):
        raise RuntimeError("the kernel fails")

    kernel = fake.backends.fused_attn_fwd
    fake.backends.fused_attn_fwd = failing_kernel
    with pytest.raises(RuntimeError, match="the kernel fails"):
        attend_with_gradients(layer, streams, grads, [14, 9], 4)
    assert names_and_selection(fake) == (failing_kernel, *before[1:])
    fake.backends.fused_attn_fwd = kernel
    assert_exact(layer, [14, 9], 16, 4)


def test_fused_attention_is_chosen_for_the_spliced_calls_alone(monkeypatch):
    fake = FakeTransformerEngine()
    fake.prefers_flash = True
    layer = build_layer(monkeypatch, fake)
    stock = fake.modules["transformer_engine.pytorch"].DotProductAttention(8, 8, 2, softmax_scale=8**-0.5)
    query, key = torch.zeros(12, 2, 8, 8), torch.zeros(12, 2, 2, 8)  # the shapes of the spliced calls
    for num_flash_calls in (1, 2):
        stock(query, key, key)
        assert_exact(layer, [14, 9], 16, 4)
        assert fake.num_flash_calls == num_flash_calls
    stock(query, key, key)
    assert fake.num_flash_calls == 3


def test_a_case_without_a_fused_kernel_is_an_error_that_says_what_to_do(monkeypatch):
    fake = FakeTransformerEngine()
    fake.is_fused_available = False
    layer = build_layer(monkeypatch, fake)
    with pytest.raises(ValueError, match=r"no fused attention kernel for these inputs .*NVTE_DEBUG=1.* aten or flash"):
        assert_exact(layer, [14, 9], 16, 4)


@pytest.mark.parametrize("num_calls", [0, 2])
def test_a_kernel_that_is_not_called_once_is_an_error(monkeypatch, num_calls):
    layer = build_layer(monkeypatch, FakeTransformerEngine())
    attention = layer.attention

    def attend(query, key, value):
        for _ in range(num_calls):
            out = attention(query, key, value)
        return out if num_calls else query.flatten(2)

    layer.attention.forward, forward = attend, attention.forward
    attention = forward
    with pytest.raises(
        RuntimeError, match=rf"called its fused attention kernel {num_calls} times in a forward, not on"
    ):
        assert_exact(layer, [14, 9], 16, 4)


def test_a_kernel_without_log_sum_exps_is_an_error():
    probabilities = torch.zeros(2, 4, 8, 8)
    with pytest.raises(RuntimeError, match=r"shape \(2, 4, 8, 8\), not one log-sum-exp.*NVTE_FUSED_ATTN_BACKEND"):
        splice.merged_result(torch.zeros(8, 2, 4, 8), [probabilities], None, torch.Size((8, 2, 4, 8)), merge=None)


def test_one_block_does_not_call_the_kernel(monkeypatch):
    fake = FakeTransformerEngine()
    layer = build_layer(monkeypatch, fake)
    fake.backends.fused_attn_fwd = None
    assert_exact(layer, [4, 3], 4, 4)
    assert_exact(layer, [3, 2], 3, 4)


# --- building a layer ------------------------------------------------------------------------------------------------


def test_a_layer_holds_a_causal_module_with_twice_the_query_heads(monkeypatch):
    layer = build_layer(monkeypatch, FakeTransformerEngine(), (8, 2), head_dim=16, tensor_model_parallel_size=2)
    assert layer.attention.heads == (8, 1, 16)
    sharing = build_layer(monkeypatch, FakeTransformerEngine(), (8, 4), head_dim=16, context_parallel_size=2)
    assert sharing.attention.heads == (8, 2, 16), "a rank that shares sequences has a part of the heads"
    assert layer.attention.softmax_scale == 0.25
    assert layer.attention.settings == {"sequence_parallel": False, "tp_group": None, "layer_number": 1}
    assert [name for name, _ in layer.named_modules()] == ["", "attention"]


def test_the_students_core_attention_attends_with_the_module_of_its_layer(monkeypatch):
    FakeTransformerEngine().installed(monkeypatch)
    core = BlockDiffusionCoreAttention(
        transformer_config((4, 2)), 3, backend=TransformerEngineAttention(HOPPER), block_size=4
    )
    assert core.backend.attention.settings["layer_number"] == 3
    assert [name for name, _ in core.named_modules()] == ["", "backend", "backend.attention"]
    streams, _ = make_inputs([16, 16], 16, (4, 2))
    both = (torch.cat(pair).transpose(0, 1) for pair in zip(streams[:3], streams[3:], strict=True))
    out = core(*both, torch.tensor([16, 16])).unflatten(2, (4, 8)).transpose(0, 1)
    expected = DENSE.attend(streams, lengths=torch.tensor([16, 16]), block_size=4, scale=8**-0.5)
    assert largest_error(out.chunk(2), expected) <= 1e-12
