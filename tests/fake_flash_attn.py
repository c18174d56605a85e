"""The flash-attention package's kernel for caches as an exact fake in plain PyTorch, with the signatures it has had.

    install_flash(monkeypatch, "flash-attn 3")      # on the CPU, in float32, `rollout.attention: flash` now serves

It computes in float64, refuses what the real one refuses, and asserts that every feature that is not used is off. Keys
behind a sequence's length are replaced by NaN first, so nothing can come from them.
"""

from __future__ import annotations

import sys
import types

import torch

from megatron_opdlm.models.attention.backend import AttentionCase


def attend_to_pages(q, k_cache, v_cache, cache_seqlens, table, softmax_scale, causal, page_multiple):
    """`[E, W, N, D]`: entry e's queries attend to its first `cache_seqlens[e]` tokens in the pages `table[e]`."""
    num_entries, _, num_heads, _ = q.shape
    page_size, num_groups = k_cache.shape[1:3]
    assert causal is False
    assert page_size % page_multiple == 0, "Paged KV cache block size must be divisible by 256"
    assert cache_seqlens.dtype == table.dtype == torch.int32, "seqlens_k and block_table must have dtype int32"
    assert cache_seqlens.shape == (num_entries,) and cache_seqlens.is_contiguous()
    assert table.shape[0] == num_entries and table.stride(-1) == 1
    assert num_heads % num_groups == 0 and k_cache.stride(-1) == v_cache.stride(-1) == q.stride(-1) == 1
    torch._assert_async((cache_seqlens <= table.shape[1] * page_size).all())
    is_cached = torch.arange(table.shape[1] * page_size, device=q.device) < cache_seqlens[:, None]
    keys, values = (pages[table.long()].flatten(1, 2).double() for pages in (k_cache, v_cache))
    keys = torch.where(is_cached[..., None, None], keys, torch.nan).repeat_interleave(num_heads // num_groups, dim=2)
    values = torch.where(is_cached[..., None, None], values, 0).repeat_interleave(num_heads // num_groups, dim=2)
    scores = torch.einsum("ewnd,ecnd->enwc", q.double(), keys) * softmax_scale
    weights = torch.where(is_cached[:, None, None], scores, -torch.inf).softmax(-1)
    return torch.einsum("enwc,ecnd->ewnd", weights, values).to(q.dtype).contiguous()


def of_version_2(page_multiple):
    """flash-attn 2.7.0 to 2.8.4."""

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        off = (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, alibi_slopes)
        assert all(value is None for value in off) and window_size == (-1, -1)
        assert softcap == num_splits == 0 and rotary_interleaved and not return_softmax_lse
        return attend_to_pages(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale, causal, page_multiple)

    return flash_attn_with_kvcache


def of_version_3():
    """flash-attn 3 from the summer of 2025 on; what it had before lacks only parameters that nobody gives."""

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
    ):  # fmt: skip
        off = (k, v, qv, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, cu_seqlens_q, cu_seqlens_k_new)
        off += (max_seqlen_q, rotary_seqlens, q_descale, k_descale, v_descale, scheduler_metadata, pack_gqa)
        assert all(value is None for value in off) and window_size == (-1, -1)
        assert attention_chunk == softcap == num_splits == sm_margin == 0
        assert rotary_interleaved and not return_softmax_lse
        return attend_to_pages(q, k_cache, v_cache, cache_seqlens, page_table, softmax_scale, causal, 1)

    return flash_attn_with_kvcache


PACKAGES = {
    "flash-attn 2": ("flash_attn.flash_attn_interface", "fa2", "2.8.3"),
    "flash-attn 3": ("flash_attn_interface", "fa3", "3.0.0"),
}
"""Package -> its module, the generation, a version of it."""


def make_module(name: str, version: str, **functions) -> types.ModuleType:
    """A module of the package."""
    module = types.ModuleType(name)
    module.__version__ = version
    vars(module).update(functions)
    return module


def install_flash(monkeypatch, package: str, *, page_size: int = 4) -> None:
    """Makes `rollout.attention: flash` serve on the CPU, with pages of so many tokens, by the fake of a package."""
    from megatron_opdlm.rollout import attention_choice, flash_paged_attention

    name, generation, version = PACKAGES[package]
    function = of_version_2(page_size) if generation == "fa2" else of_version_3()
    module = make_module(name, version, flash_attn_with_kvcache=function)
    monkeypatch.setitem(sys.modules, name, module)
    # of version 2 the number is found on the package above its modules
    monkeypatch.setitem(sys.modules, name.split(".")[0], module)
    monkeypatch.setattr("megatron_opdlm.models.attention.flash.is_installed", lambda other: other == name)
    monkeypatch.setitem(flash_paged_attention.PAGE_SIZES, generation, page_size)
    case = AttentionCase(device_type="cuda", compute_capability=(9, 0), dtype=torch.bfloat16, head_dim=128)
    monkeypatch.setattr(attention_choice, "attention_case", lambda model, device: case)
