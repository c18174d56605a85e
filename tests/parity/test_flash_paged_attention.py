"""Decoding with the flash-attention package's kernel behind an exact fake; the kernel itself needs a GPU."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_opdlm.config.schema import ParallelConfig, RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.attention_pattern import may_attend
from megatron_opdlm.models.attention.backend import AttentionCase
from tests.fake_flash_attn import install_flash, make_module, of_version_2, of_version_3
from tests.parity.test_continuous_batching import CASES, PAGE_GIB, assert_same
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, load_student, tiny_config

CPU = torch.device("cpu")
PROMPT_LENGTHS = (1, 3, 4, 6, 9, 16, 21)


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 44, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    return [Prompt(prompt_id=100 + row, token_ids=tuple(prompt)) for row, prompt in enumerate(ids)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def student(folder, world_of_one):
    with layout(ParallelConfig()) as groups:
        yield load_student(tiny_config(folder, rollout=RolloutConfig(stop_token_ids=[5, 17])), groups)


def generate(student, **settings):
    """The engine's statistics, and the trajectories by prompt."""
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    model, special = student
    rollout = RolloutConfig(max_new_tokens=24, stop_token_ids=[5, 17], **settings)
    engine = RolloutEngine(model, rollout, special, seed=11)
    trajectories = engine.generate([RolloutTask(prompt, rollout.max_new_tokens) for prompt in prompts()], step=3)
    return engine.statistics, {t.prompt_id: t for t in trajectories}


@pytest.mark.parametrize("package", ["flash-attn 2", "flash-attn 3"])
@pytest.mark.parametrize("case", CASES)
def test_trajectories_are_those_of_sdpa(student, monkeypatch, case, package):
    _, expected = generate(student, attention="sdpa", **CASES[case])
    install_flash(monkeypatch, package)
    statistics, actual = generate(student, attention="flash", max_tokens_in_flight=32, **CASES[case])
    assert_same(actual, expected)
    assert statistics.num_hidden_pairs == 0


def test_neither_evictions_nor_the_size_of_a_page_change_a_trajectory(student, monkeypatch):
    _, expected = generate(student, attention="sdpa", dynamic_threshold=0.1)
    for page_size, settings in ((4, {"cache_gib": 13 * PAGE_GIB}), (3, {}), (64, {"batch_size": 2})):
        install_flash(monkeypatch, "flash-attn 3", page_size=page_size)
        statistics, actual = generate(student, attention="flash", dynamic_threshold=0.1, **settings)
        assert_same(actual, expected)
        assert (statistics.num_preemptions > 0) == ("cache_gib" in settings)


# --- the layout -------------------------------------------------------------------------------------------------------


def kernel_of(function, generation="fa3", version="3.0.0"):
    from megatron_opdlm.rollout.flash_paged_attention import PagedKernel

    return PagedKernel(make_module("flash_attn_interface", version, flash_attn_with_kvcache=function), generation)


def test_a_block_is_an_entry_that_ends_where_the_block_does():
    from megatron_opdlm.rollout.flash_paged_attention import FlashPagedAttention
    from megatron_opdlm.rollout.kv_cache import QueryTokens

    attention = FlashPagedAttention(4, kernel_of(of_version_3()), CPU)
    tokens = QueryTokens(
        torch.zeros(12).long(), torch.tensor([4, 0]), torch.tensor([4, 8]), torch.tensor([[7, 0], [3, 2]])
    )
    entries = attention.lay_out(tokens)
    assert entries.lengths_E.tolist() == [8, 4, 8]
    assert entries.page_table_EP.tolist() == [[7, 0], [3, 2], [3, 2]]
    assert entries.lengths_E.dtype == entries.page_table_EP.dtype == torch.int32
    assert attention.num_pairs == 4 * (8 + 4 + 8)


@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 2), (6, 2), (2, 2), (3, 1)])
def test_attention_is_that_of_a_mask_in_float64(num_heads, num_groups):
    from megatron_opdlm.rollout.flash_paged_attention import FlashPagedAttention
    from megatron_opdlm.rollout.kv_cache import QueryTokens

    generator = torch.Generator().manual_seed(0)
    attention = FlashPagedAttention(4, kernel_of(of_version_3()), CPU)
    pages = torch.randn(2, 6, 5, num_groups, 8, dtype=torch.float64, generator=generator)
    tables, first, counts = [[3, 1, 0], [5, 2, 4]], [4, 0], [4, 12]
    query_TND = torch.randn(16, num_heads, 8, dtype=torch.float64, generator=generator)
    tokens = QueryTokens(torch.zeros(16).long(), torch.tensor(first), torch.tensor(counts), torch.tensor(tables))
    heads_TGJD = F.pad(query_TND.unflatten(1, (num_groups, -1)), (0, 0, 0, 1))
    actual_TND = attention.attend(attention.lay_out(tokens), heads_TGJD, *pages, 0.3)
    clean = torch.zeros((), dtype=torch.bool)
    for table, start, queries_WND, out_WND in zip(
        tables, first, query_TND.split(counts), actual_TND.split(counts), strict=True
    ):
        end = start + len(queries_WND)
        keys, values = (x[table].flatten(0, 1)[:end].repeat_interleave(num_heads // num_groups, 1) for x in pages)
        is_visible = may_attend(torch.arange(start, end)[:, None], clean, torch.arange(end), clean, 4)
        scores = torch.einsum("wnd,cnd->nwc", queries_WND, keys) * 0.3
        weights = scores.masked_fill(~is_visible, -torch.inf).softmax(-1)
        assert (torch.einsum("nwc,cnd->wnd", weights, values) - out_WND).abs().max() <= 1e-12


# --- what it asks for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "version", "waits"),
    [
        ("fa2", "2.7.4.post1", False),
        ("fa2", "2.8.3.post1", False),
        ("fa2", "2.8.4", True),
        ("fa2", "2.9.0", True),
        ("fa2", "", True),
        ("fa3", "3.0.0.b1", False),
        ("fa3", "", False),
    ],
)
def test_versions_that_wait_for_the_gpu_are_known(generation, version, waits):
    assert kernel_of(of_version_2(256), generation, version).waits_for_gpu is waits


def test_pages_of_version_2_are_multiples_of_256():
    assert kernel_of(of_version_2(256), "fa2", "2.8.3").page_size % 256 == 0


def test_a_version_without_a_page_table_is_refused():
    def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=None, softmax_scale=None, causal=False):
        raise AssertionError("never called")

    with pytest.raises(ValueError, match=r"of flash_attn_interface 3\.0\.0 lacks block_table and page_table"):
        kernel_of(flash_attn_with_kvcache)


def test_a_package_without_the_function_is_refused():
    from megatron_opdlm.rollout.flash_paged_attention import PagedKernel

    with pytest.raises(ValueError, match=r"flash_attn_interface 3\.0\.0 has no flash_attn_with_kvcache"):
        PagedKernel(make_module("flash_attn_interface", "3.0.0"), "fa3")


# --- the choice -------------------------------------------------------------------------------------------------------

MODEL = SimpleNamespace(
    num_attention_heads=4,
    num_query_groups=2,
    tensor_model_parallel_size=1,
    params_dtype=torch.float32,
    kv_channels=12,
)
HOPPER = {"device_type": "cuda", "compute_capability": (9, 0), "dtype": torch.bfloat16, "head_dim": 128}


def choose(monkeypatch, attention: str, **case):
    from megatron_opdlm.rollout import attention_choice

    monkeypatch.setattr(attention_choice, "attention_case", lambda *_: AttentionCase(**HOPPER | case))
    return attention_choice.choose_attention(RolloutConfig(attention=attention), MODEL, CPU)(32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_type": "cpu", "compute_capability": None}, "it needs a GPU, the model is on cpu"),
        ({"dtype": torch.float32}, r"precision\.dtype \(torch\.float32\) must be bfloat16 or float16"),
        ({"compute_capability": (7, 5)}, r"compute capability \(7\.5\) must be at least 8\.0"),
        ({"head_dim": 12}, r"head_dim \(12\) must be a multiple of 8"),
        ({}, r"the package flash-attn \(2\.7 or newer, or 3\) is not installed"),
    ],
)
def test_flash_says_what_it_cannot_serve_and_auto_takes_sdpa(monkeypatch, caplog, changes, reason):
    from megatron_opdlm.rollout.paged_attention import SdpaPagedAttention

    monkeypatch.setattr("megatron_opdlm.models.attention.flash.is_installed", lambda name: False)
    with pytest.raises(ValueError, match=f"rollout.attention flash: {reason}"):
        choose(monkeypatch, "flash", **changes)
    with caplog.at_level(logging.INFO):
        assert isinstance(choose(monkeypatch, "auto", **changes), SdpaPagedAttention)
    assert "rollout.attention auto: not flash:" in caplog.text and "rollout.attention auto: sdpa" in caplog.text


@pytest.mark.parametrize("package", ["flash-attn 2", "flash-attn 3"])
def test_auto_takes_flash_where_it_serves(monkeypatch, package):
    from megatron_opdlm.rollout.flash_paged_attention import FlashPagedAttention
    from megatron_opdlm.rollout.paged_attention import SdpaPagedAttention

    install_flash(monkeypatch, package)
    attention = choose(monkeypatch, "auto")
    assert isinstance(attention, FlashPagedAttention) and attention.is_capturable
    assert isinstance(choose(monkeypatch, "sdpa"), SdpaPagedAttention), "a choice by name is honoured"
