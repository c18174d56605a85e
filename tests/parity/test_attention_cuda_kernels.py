"""PyTorch's attention kernels for GPUs, as far as a machine without one can hold them to it.

The operators are called on meta tensors, which checks their signatures, and replaced by exact fakes on the CPU, which
checks layouts and numbers against `DenseAttention` in float64.
"""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch

from megatron_opdlm.models.attention import aten_cuda, requirements
from megatron_opdlm.models.attention.aten import AtenAttention, CpuFlash
from megatron_opdlm.models.attention.backend import AttentionCase, build_backend
from tests.parity.test_attention import assert_exact, errors_against_oracle

HOPPER = {"device_type": "cuda", "compute_capability": (9, 0), "dtype": torch.bfloat16, "head_dim": 128}
SHAPES = [([12, 7], 12, 4), ([13, 13], 13, 4), ([9, 5], 9, 1), ([8], 8, 8), ([21, 3], 21, 5)]


def case(**changes):
    return AttentionCase(**{**HOPPER, **changes})


@pytest.fixture
def installed(monkeypatch):
    """The modules of the flash-attention project that count as installed: none at first."""
    names = set()
    monkeypatch.setattr(aten_cuda, "is_installed", lambda name: name in names)
    return names


def assert_refused(backend, attention_case, reason):
    found = backend.refusal(attention_case)
    assert found is not None
    assert re.search(reason, found), found


def on_meta(kernel):
    """Calls both directions on meta tensors, with the strides that Megatron's transposed keys have."""
    query = torch.empty(2, 12, 8, 64, dtype=torch.bfloat16, device="meta")
    key = torch.empty(16, 2, 2, 64, dtype=torch.bfloat16, device="meta").transpose(0, 1)[:, :-4]
    out, lse = kernel.forward(query, key, key, 0.125)
    assert (out.shape, lse.shape, lse.dtype) == (query.shape, (2, 8, 12), torch.float32)
    grads = kernel.backward(out, query, key, key, out, lse, 0.125)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]


def test_flash_operators_take_the_call():
    on_meta(aten_cuda.FlashAttention(None))


def test_cudnn_operators_take_the_call():
    on_meta(aten_cuda.CudnnAttention())


def fake_cudnn(monkeypatch, lse_dims):
    """The cuDNN operators on the CPU: heads first, a log-sum-exp of 3 or 4 dimensions, one layout for the outputs."""

    def forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, *, scale):
        assert (attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask) == (
            None,
            True,
            0.0,
            True,
            False,
        )
        out, lse = CpuFlash().forward(*(x.transpose(1, 2) for x in (query, key, value)), scale)
        return out.transpose(1, 2), lse[..., None] if lse_dims == 4 else lse, None, None, 0, 0, 0, 0, None

    def backward(
        grad_out, query, key, value, out, lse, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
        max_k, dropout_p, is_causal, *, scale,
    ):  # fmt: skip
        assert all(x.transpose(1, 2).is_contiguous() for x in (grad_out, out)), "one plan knows one layout"
        assert lse.dim() == lse_dims
        assert lse.is_contiguous()
        assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p, is_causal) == (None, None, None, 0.0, True)
        assert max_q == max_k == query.shape[2]
        tensors = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        grads = CpuFlash().backward(*tensors, lse.reshape(query.shape[:3]), scale)
        return tuple(x.transpose(1, 2) for x in grads)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", forward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", backward)


@pytest.mark.parametrize("lse_dims", [3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_cudnn_matches_dense_float64_whatever_shape_its_lse_has(shape, lse_dims, monkeypatch):
    fake_cudnn(monkeypatch, lse_dims)
    assert_exact(AtenAttention(case()), *shape)


def test_cudnn_gets_outputs_in_one_layout_whatever_they_come_in(monkeypatch):
    fake_cudnn(monkeypatch, lse_dims=4)
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (torch.randn(2, 3, 5, 8, generator=generator).transpose(1, 2) for _ in range(4))
    kernel = aten_cuda.CudnnAttention()
    out, lse = kernel.forward(query, key, value, 0.25)
    expected = CpuFlash().backward(grad, query, key, value, out, lse, 0.25)
    grads = kernel.backward(grad, query, key, value, out.transpose(1, 2).contiguous().transpose(1, 2), lse, 0.25)
    torch.testing.assert_close(grads, expected)


def fake_flash(monkeypatch):
    """PyTorch's flash operators on the CPU; returns the switches of generation made, and the one that each call met."""
    switches, used = [None], []

    def forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale
    ):
        assert (cum_seq_q, cum_seq_k, dropout_p, is_causal, return_debug_mask) == (None, None, 0.0, True, False)
        assert max_q == max_k == query.shape[1]
        used.append(switches[-1])
        return *CpuFlash().forward(query, key, value, scale), 0, 0, 0

    def backward(
        grad_out, query, key, value, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
        unused, *, scale,
    ):  # fmt: skip
        assert (cum_seq_q, cum_seq_k, dropout_p, is_causal) == (None, None, 0.0, True)
        assert (rng_state.shape, rng_state.dtype, unused.shape) == ((2,), torch.uint64, ())
        used.append(switches[-1])
        return CpuFlash().backward(grad_out, query, key, value, out, lse, scale)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: switches[-1])
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", switches.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: switches.append(None))
    return switches, used


@pytest.mark.parametrize("shape", SHAPES)
def test_the_flash_operators_match_dense_float64(shape, monkeypatch):
    fake_flash(monkeypatch)
    assert_exact(AtenAttention(case(kernel="fa2")), *shape)


def test_each_kernel_runs_on_its_own_flash_attention(monkeypatch, installed):
    switches, used = fake_flash(monkeypatch)
    installed.add("flash_attn_interface")
    kernels = [AtenAttention(case(kernel=name)).kernel for name in ("fa3", "fa2")]
    assert switches == [None, "FA3"]
    x = torch.zeros(1, 3, 2, 8)
    for kernel in (*kernels, *kernels):
        kernel.forward(x, x, x, 1.0)
    for kernel in kernels:
        kernel.backward(x, x, x, x, x, torch.zeros(1, 2, 3), 1.0)
    assert used == ["FA3", None, "FA3", None, "FA3", None]


def test_a_flash_attention_that_cannot_be_activated_is_refused(monkeypatch, installed):
    fake_flash(monkeypatch)
    installed.add("flash_attn_interface")

    def activate(generation):
        raise RuntimeError(f"no {generation} kernels")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    with pytest.raises(ValueError, match=r"attention\.kernel \(fa3\): PyTorch cannot switch to it: no FA3 kernels"):
        AtenAttention(case(kernel="fa3"))


def test_wrong_statistics_in_the_backward_of_cudnn_are_seen(monkeypatch):
    fake_cudnn(monkeypatch, lse_dims=4)
    backend = AtenAttention(case())
    backward = backend.kernel.backward
    monkeypatch.setattr(backend.kernel, "backward", lambda *args: backward(*args[:5], args[5] + 0.1, args[6]))
    out_error, grad_error = errors_against_oracle(backend, [12, 7], 12, 4)
    assert out_error <= 1e-12
    assert grad_error > 1e-3


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "cudnn"),
        ({"compute_capability": (10, 0)}, "cudnn"),
        ({"compute_capability": (8, 0)}, "fa2"),
        ({"compute_capability": (12, 0)}, "fa2"),
        ({"head_dim": 256}, "fa2"),
        ({"compute_capability": (8, 6), "kernel": "cudnn"}, "cudnn"),
        ({"kernel": "fa2"}, "fa2"),
    ],
)
def test_auto_takes_cudnn_where_it_is_fast_and_able(changes, kernel):
    assert aten_cuda.refusal(case(**changes)) is None
    assert aten_cuda.choose_kernel(case(**changes)) == kernel


@pytest.mark.parametrize(("version", "kernel"), [(None, "cudnn"), (91500, "fa2"), (91501, "cudnn")])
def test_a_cudnn_that_errs_at_odd_lengths_is_neither_chosen_nor_allowed(version, kernel, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert aten_cuda.choose_kernel(case()) == kernel
    reason = aten_cuda.refusal(case(kernel="cudnn"))
    assert reason == (
        None if kernel == "cudnn" else "cuDNN (91500) must be newer than 9.15.0 (91500) for attention.kernel cudnn"
    )


def test_cudnn_is_not_taken_where_deterministic_algorithms_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert aten_cuda.choose_kernel(case()) == "fa2"
    assert "not deterministic" in aten_cuda.refusal(case(kernel="cudnn"))


def test_the_backend_for_an_h100_is_built_without_one():
    assert isinstance(build_backend("aten", case()).kernel, aten_cuda.CudnnAttention)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fp8": True}, r"attention\.fp8 \(true\) needs attention\.backend te"),
        ({"fp8": True, "device_type": "cpu"}, r"attention\.fp8 \(true\) needs attention\.backend te"),
        ({"device_type": "cpu", "kernel": "fa2"}, r"attention\.kernel \(fa2\) must be auto on a CPU"),
        ({"compute_capability": (7, 0)}, r"compute capability \(7\.0\) must be at least 8\.0"),
        ({"dtype": torch.float32}, r"precision\.dtype \(torch\.float32\) must be bfloat16 or float16"),
        ({"head_dim": 36}, r"head_dim \(36\) must be a multiple of 8 and at most 256"),
        ({"head_dim": 192, "kernel": "cudnn"}, r"head_dim \(192\) must be at most 128 for attention\.kernel cudnn"),
        ({"kernel": "triton"}, r"attention\.kernel \(triton\) must be one of auto, fa2, fa3, fa4, cudnn"),
        ({"kernel": "fa3", "compute_capability": (8, 0)}, r"needs compute capability 9\.x, the GPU has 8\.0"),
        (
            {"kernel": "fa4", "compute_capability": (12, 0)},
            r"needs compute capability 9\.x or 10\.x, the GPU has 12\.0",
        ),
        ({"kernel": "fa4", "head_dim": 256}, r"head_dim \(256\) must be at most 128 for attention\.kernel fa4"),
        ({"kernel": "fa3"}, "needs the module flash_attn_interface of the flash-attention project"),
        ({"kernel": "fa4"}, r"needs the module flash_attn\.cute\.interface of the flash-attention project"),
    ],
)
def test_aten_says_what_it_cannot_serve(changes, reason, installed):
    assert_refused(AtenAttention, case(**changes), reason)


def test_aten_refuses_a_flash_attention_that_this_pytorch_cannot_switch_to(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "restore_flash_attention_impl")
    assert_refused(AtenAttention, case(kernel="fa3"), "needs a PyTorch that can switch its flash attention")
    aten_cuda.switch_flash_attention(None)


def test_cudnn_plans_for_several_lengths_are_refused(monkeypatch):
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert_refused(AtenAttention, case(kernel="cudnn"), "TORCH_CUDNN_SDPA_AVOID_RECOMPILE must be unset")
    assert aten_cuda.choose_kernel(case()) == "fa2"


# --- what is installed -----------------------------------------------------------------------------------------------


def test_a_module_is_found_without_importing_the_package_above_it(tmp_path, monkeypatch):
    package = tmp_path / "opdlm_fake_kernels"
    (package / "cute").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "cute" / "interface.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    names = ("opdlm_fake_kernels", "opdlm_fake_kernels.cute.interface", "opdlm_fake_kernels.other", "opdlm_nothing.x")
    assert [requirements.is_installed(name) for name in names] == [True, True, False, False]


def test_a_module_that_is_loaded_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "opdlm_loaded.kernels", types.ModuleType("opdlm_loaded.kernels"))
    assert requirements.is_installed("opdlm_loaded.kernels")
    assert requirements.is_installed("torch.nn.attention.bias")
    assert not requirements.is_installed("torch.nn.attention.nothing")
