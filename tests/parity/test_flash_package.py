"""The flash-attention package behind exact fakes: modules with the signatures of its private functions.

There is one for each set of signatures that is understood. They compute with PyTorch's CPU kernel, so numbers are
compared with `DenseAttention` in float64, and assert that every feature that is not used is off.
"""

from __future__ import annotations

import inspect
import logging
import sys
import types

import pytest
import torch

from megatron_opdlm.models.attention import flash
from megatron_opdlm.models.attention.aten import CpuFlash
from megatron_opdlm.models.attention.flash import FlashAttention
from tests.parity.test_attention import assert_exact
from tests.parity.test_attention_cuda_kernels import SHAPES, assert_refused, case

# --- fakes: exact numbers behind the real signatures -----------------------------------------------------------------


def run_forward(q, k, v, softmax_scale, causal, **unused):
    assert causal is True
    assert all(value in (None, 0, 0.0, -1, False, (-1, -1)) for value in unused.values()), unused
    return CpuFlash().forward(q, k, v, softmax_scale)


def run_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, **unused):
    assert all(x.is_contiguous() for x in (dq, dk, dv)), "the package writes into dense gradients"
    assert causal is True
    assert softmax_lse.is_contiguous()
    assert all(value in (None, 0, 0.0, -1, False, (-1, -1)) for value in unused.values()), unused
    grads = CpuFlash().backward(dout, q, k, v, out, softmax_lse, softmax_scale)
    for buffer, grad in zip((dq, dk, dv), grads, strict=True):
        buffer.copy_(grad)


def flash_2_7():
    """flash-attn 2.7.0 to 2.8.4: everything but the random state is required."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        rest = {"a": dropout_p, "b": window_size_left, "c": window_size_right, "d": softcap, "e": alibi_slopes}
        out, lse = run_forward(q, k, v, softmax_scale, causal, f=return_softmax, **rest)
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        rest = {"a": dropout_p, "b": window_size_left, "c": window_size_right, "d": softcap, "e": alibi_slopes}
        rest |= {"f": deterministic, "g": rng_state}
        run_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, **rest)
        return torch.empty(0)

    return _flash_attn_forward, _flash_attn_backward


def flash_3_of_january_2025():
    """Most parameters are required, one window size, `causal` in both directions."""

    def _flash_attn_forward(
        q, k, v, k_new, v_new, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,
        max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, q_descale, k_descale, v_descale,
        softmax_scale, causal, window_size=(-1, -1), sink_token_length=0, softcap=0.0, rotary_interleaved=True,
        num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        rest = dict(enumerate((k_new, v_new, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k)))
        rest |= {10: max_seqlen_q, 11: max_seqlen_k, 12: page_table, 13: kv_batch_idx, 14: leftpad_k, 15: rotary_cos}
        rest |= {16: rotary_sin, 17: q_descale, 18: k_descale, 19: v_descale, 20: window_size, 21: sink_token_length}
        rest |= {22: softcap, 23: pack_gqa, 24: sm_margin}
        assert num_splits == 1
        assert rotary_interleaved
        return *run_forward(q, k, v, softmax_scale, causal, **{f"a{i}": x for i, x in rest.items()}), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), sink_token_length=0, softcap=0.0,
        deterministic=False, sm_margin=0,
    ):  # fmt: skip
        rest = {"a": cu_seqlens_q, "b": cu_seqlens_k, "c": sequed_q, "d": sequed_k, "e": max_seqlen_q}
        rest |= {"f": max_seqlen_k, "g": window_size, "h": softcap, "i": deterministic, "j": sink_token_length}
        run_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, z=sm_margin, **rest)
        return dq, dk, dv, torch.empty(0)

    return _flash_attn_forward, _flash_attn_backward


def flash_3_of_november_2025():
    """Nearly everything has a default, two window sizes, `causal` forward and `is_causal` backward."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        assert num_splits == 1
        return *run_forward(q, k, v, softmax_scale, causal, a=out_, b=qv, c=softcap), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        run_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, is_causal, a=deterministic, b=softcap)
        return torch.empty(0)

    return _flash_attn_forward, _flash_attn_backward


PACKAGES = {
    "flash-attn 2.7": ("flash_attn.flash_attn_interface", flash_2_7, {"compute_capability": (8, 0)}),
    "flash-attn 3, January 2025": ("flash_attn_interface", flash_3_of_january_2025, {}),
    "flash-attn 3, November 2025": ("flash_attn_3.flash_attn_interface", flash_3_of_november_2025, {"kernel": "fa3"}),
}


@pytest.fixture
def install(monkeypatch):
    """Installs modules with the two private functions; nothing else of the package is installed."""
    installed = set()
    monkeypatch.setattr(flash, "is_installed", lambda name: name in installed)

    def install_module(name, functions):
        module = types.ModuleType(name)
        module.__version__ = "9.9"
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
        installed.add(name)

    return install_module


# --- numbers and signatures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("package", PACKAGES)
def test_flash_matches_dense_float64_with_every_known_signature(package, shape, heads, install):
    module_name, functions, changes = PACKAGES[package]
    install(module_name, functions())
    assert FlashAttention.refusal(case(**changes)) is None
    assert_exact(FlashAttention(case(**changes)), *shape, heads=heads)


def test_flash_in_float32_matches_dense_float64(install):
    install("flash_attn_interface", flash_3_of_november_2025())
    assert_exact(FlashAttention(case()), [13, 6], 13, 4, dtype=torch.float32)


def test_flash_reads_the_signature_behind_a_custom_operator(install):
    def _flash_attn_forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, causal: bool, num_splits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert num_splits == 1
        out, lse = run_forward(q, k, v, softmax_scale, causal)
        return out.contiguous(), lse

    _, backward = flash_3_of_november_2025()
    schema = "(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, int num_splits) -> (Tensor, Tensor)"
    operator = torch.library.custom_op(
        "opdlm_test::_flash_attn_forward", _flash_attn_forward, mutates_args=(), device_types="cpu", schema=schema
    )
    operator.__name__ = "_flash_attn_forward"
    assert "q" not in inspect.signature(operator).parameters
    install("flash_attn_interface", (operator, backward))
    assert_exact(FlashAttention(case()), [12, 7], 12, 4)


def test_flash_takes_version_3_on_hopper_and_version_2_elsewhere(install, caplog):
    install("flash_attn.flash_attn_interface", flash_2_7())
    install("flash_attn_interface", flash_3_of_november_2025())
    with caplog.at_level(logging.INFO):
        for capability in ((9, 0), (8, 0), (10, 0)):
            FlashAttention(case(compute_capability=capability))
    assert [record.message.split()[-1] for record in caplog.records] == ["fa3", "fa2", "fa2"]


def test_flash_takes_version_2_on_hopper_if_that_is_what_there_is(install):
    install("flash_attn.flash_attn_interface", flash_2_7())
    assert FlashAttention.refusal(case()) is None
    assert "needs flash-attn 3" in FlashAttention.refusal(case(kernel="fa3"))
    assert_exact(FlashAttention(case()), [12, 7], 12, 4)


def lacks(parameter):
    def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, is_causal, deterministic):
        raise AssertionError("never called")

    signature = inspect.signature(_flash_attn_backward)
    kept = [x for x in signature.parameters.values() if x.name != parameter]
    _flash_attn_backward.__signature__ = signature.replace(parameters=kept)
    return _flash_attn_backward


@pytest.mark.parametrize("parameter", ["softmax_lse", "out", "dk", "softmax_scale", "is_causal", "deterministic"])
def test_flash_refuses_a_version_whose_backward_lost_a_parameter(parameter, install):
    install("flash_attn_interface", (flash_3_of_november_2025()[0], lacks(parameter)))
    named = "causal" if parameter == "is_causal" else parameter
    with pytest.raises(ValueError, match=rf"_flash_attn_backward of flash_attn_interface 9\.9 lacks {named};"):
        FlashAttention(case())


def test_flash_refuses_a_version_that_requires_an_unknown_parameter(install):
    def _flash_attn_forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right, sinks):
        raise AssertionError("never called")

    install("flash_attn.flash_attn_interface", (_flash_attn_forward, flash_2_7()[1]))
    with pytest.raises(ValueError, match="also requires sinks; known are flash-attn"):
        FlashAttention(case(kernel="fa2"))


def test_flash_refuses_version_2_6_which_returns_the_queries_second(install):
    def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, sm):
        raise AssertionError("never called")

    install("flash_attn.flash_attn_interface", (_flash_attn_forward, flash_2_7()[1]))
    with pytest.raises(ValueError, match="lacks window_size_left, window_size_right"):
        FlashAttention(case(kernel="fa2"))


def test_flash_refuses_version_3_of_2024_which_returns_the_queries_second(install):
    def _flash_attn_forward(q, k, v, softmax_scale, causal, window_size, gqa_parallel=False):
        raise AssertionError("never called")

    install("flash_attn_interface", (_flash_attn_forward, flash_3_of_november_2025()[1]))
    with pytest.raises(ValueError, match="lacks num_splits"):
        FlashAttention(case())


def test_flash_refuses_a_package_without_the_private_functions(install):
    install("flash_attn_interface", ())
    with pytest.raises(ValueError, match=r"flash_attn_interface 9\.9 has no _flash_attn_forward"):
        FlashAttention(case())


def test_flash_says_why_a_package_does_not_load(install, monkeypatch):
    install("flash_attn_interface", ())
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(ValueError, match="flash_attn_interface cannot be imported"):
        FlashAttention(case())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fp8": True}, r"attention\.fp8 \(true\) needs attention\.backend te"),
        ({"device_type": "cpu", "compute_capability": None}, "it needs a GPU, the model is on cpu"),
        ({"compute_capability": (7, 5)}, r"compute capability \(7\.5\) must be at least 8\.0"),
        ({"dtype": torch.float32}, r"precision\.dtype \(torch\.float32\) must be bfloat16 or float16"),
        ({"head_dim": 100}, r"head_dim \(100\) must be a multiple of 8 and at most 256"),
        ({"head_dim": 264}, r"head_dim \(264\) must be a multiple of 8 and at most 256"),
        ({"kernel": "cudnn"}, r"attention\.kernel \(cudnn\) must be one of auto, fa3, fa2"),
        ({"kernel": "fa3", "compute_capability": (8, 9)}, "needs compute capability 9.x, the GPU has 8.9"),
        ({}, r"the package is not installed: attention\.kernel \(auto\) needs flash-attn 3, or 2\.7 or newer"),
        ({"kernel": "fa2"}, r"the package is not installed: attention\.kernel \(fa2\) needs flash-attn 2\.7 or newer"),
    ],
)
def test_flash_says_what_it_cannot_serve(changes, reason, install):
    assert_refused(FlashAttention, case(**changes), reason)
