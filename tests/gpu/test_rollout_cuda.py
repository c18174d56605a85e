"""Decoding on a GPU: the kernels behind the cache, CUDA graphs, and steps that wait for the GPU once."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron_opdlm.config.schema import ParallelConfig, PrecisionConfig, RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.attention_pattern import may_attend
from megatron_opdlm.models.attention.backend import AttentionCase
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, load_student, tiny_config

pytestmark = pytest.mark.gpu
HEADS, GROUPS, DIM = 8, 2, 128
PROMPT_LENGTHS = (1, 2, 3, 4, 7, 30, 64, 129, 300)


@pytest.fixture
def world_of_one_gpu():
    """A process group of this process on its GPU."""
    from megatron_opdlm.parallel.initialize import initialize, shut_down

    initialize(ParallelConfig(), seed=0)
    yield
    shut_down()


@pytest.fixture
def student(world_of_one_gpu, tmp_path):
    folder = make_tiny_qwen3(tmp_path, seed=1, hidden_size=256, head_dim=128)
    config = tiny_config(folder, rollout=RolloutConfig(stop_token_ids=[5, 17]))
    with layout(ParallelConfig()) as groups:
        yield load_student(dataclasses.replace(config, precision=PrecisionConfig(dtype="bfloat16")), groups)


def generate(student, **settings):
    """The engine and the trajectories, or a skip where the kernel is not installed."""
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    model, special = student
    rollout = RolloutConfig(max_new_tokens=48, stop_token_ids=[5, 17], dynamic_threshold=0.1, **settings)
    try:
        engine = RolloutEngine(model, rollout, special, seed=11)
    except ValueError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 44, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    tasks = [RolloutTask(Prompt(row, tuple(prompt)), rollout.max_new_tokens) for row, prompt in enumerate(ids)]
    return engine, engine.generate(tasks, step=3)


def attention_of(name: str, block_size: int, longest: int):
    from megatron_opdlm.rollout.flash_paged_attention import FlashPagedAttention, flash_refusal, load_kernel
    from megatron_opdlm.rollout.paged_attention import Heads, SdpaPagedAttention

    device = torch.device("cuda")
    if name == "sdpa":
        return SdpaPagedAttention(block_size, Heads(GROUPS, HEADS // GROUPS), longest, torch.bfloat16, device)
    case = AttentionCase(
        device_type="cuda",
        compute_capability=torch.cuda.get_device_capability(),
        dtype=torch.bfloat16,
        head_dim=DIM,
    )
    if reason := flash_refusal(case):
        pytest.skip(reason)
    return FlashPagedAttention(block_size, load_kernel(case), device)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("name", ["sdpa", "flash"])
def test_attention_over_pages_is_that_of_a_mask_in_float64(name, block_size):
    from megatron_opdlm.rollout.kv_cache import QueryTokens

    attention = attention_of(name, block_size, longest=1024)
    size, generator = attention.page_size, torch.Generator("cuda").manual_seed(0)
    width = 1024 // size
    keys, values = torch.randn(2, 1 + 2 * width, size, GROUPS, DIM, device="cuda", generator=generator).bfloat16()
    first, counts = torch.tensor([592, 0]), torch.tensor([block_size, 320])
    tables = (1 + torch.randperm(2 * width, generator=torch.Generator().manual_seed(0))).view(2, width)
    num_tokens = int(counts.sum())
    query_TND = torch.randn(num_tokens, HEADS, DIM, device="cuda", generator=generator).bfloat16()
    tokens = QueryTokens(torch.zeros(num_tokens).long(), first, counts, tables)
    heads_TGJD = F.pad(query_TND.unflatten(1, (GROUPS, -1)), (0, 0, 0, 1))
    actual_TND = attention.attend(attention.lay_out(tokens), heads_TGJD, keys, values, DIM**-0.5)
    clean = torch.zeros((), dtype=torch.bool)
    for row, (queries, out) in enumerate(
        zip(query_TND.split(counts.tolist()), actual_TND.split(counts.tolist()), strict=True)
    ):
        end = int(first[row] + counts[row])
        key, value = (
            x[tables[row].cuda()].flatten(0, 1)[:end].double().repeat_interleave(HEADS // GROUPS, 1)
            for x in (keys, values)
        )
        visible = may_attend(torch.arange(int(first[row]), end)[:, None], clean, torch.arange(end), clean, block_size)
        scores = torch.einsum("wnd,cnd->nwc", queries.double(), key) * DIM**-0.5
        exact = torch.einsum("nwc,cnd->wnd", scores.masked_fill(~visible.cuda(), -torch.inf).softmax(-1), value)
        assert (out.double() - exact).norm() / exact.norm() <= 6e-3


def test_replayed_graphs_give_what_the_same_forwards_give_one_by_one(student, monkeypatch):
    """Filled up to the same sizes, so that the same kernels run and no rounding differs."""
    from megatron_opdlm.rollout import generation

    engine, replayed = generate(student, attention="flash")
    if not engine.statistics.num_replays:
        pytest.skip("this version of flash-attn cannot be captured")

    def run_again(forward):
        hidden_TH = forward()
        return lambda: hidden_TH.copy_(forward()), hidden_TH

    monkeypatch.setattr(generation, "CudaCapture", lambda: run_again)
    _, one_by_one = generate(student, attention="flash")
    for actual, expected in zip(replayed, one_by_one, strict=True):
        assert actual.terminal_ids_T.equal(expected.terminal_ids_T)
        assert actual.step_map_R.equal(expected.step_map_R)
        assert actual.log_probs_R.equal(expected.log_probs_R)


def test_graphs_give_their_memory_back_after_a_rollout(student):
    generate(student, attention="flash")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    generate(student, attention="flash")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "flash", "flash in graphs"])
def test_a_step_waits_for_the_gpu_in_its_one_copy_alone(student, monkeypatch, attention, settings):
    from megatron_opdlm.rollout import forward_graphs
    from megatron_opdlm.rollout.block_decoder import BlockDecoder

    settings = settings | {"attention": attention.split()[0], "cuda_graphs": "graphs" in attention}
    engine, _ = generate(student, **settings)  # what is prepared at first calls may wait
    if attention != "sdpa" and engine._build_attention(8).kernel.waits_for_gpu:
        pytest.skip("this version of flash-attn waits for the GPU in every call")
    num_copies, copy_to_host, take_step = 0, torch.Tensor.cpu, BlockDecoder._take_step
    capture = forward_graphs.CudaCapture.__call__

    def copy_and_count(tensor):
        nonlocal num_copies
        num_copies += tensor.is_cuda
        with waiting("default"):
            return copy_to_host(tensor)

    def take_watched_step(decoder, plan):
        with waiting("error"):
            yield from take_step(decoder, plan)

    def capture_and_wait(recorder, forward):
        with waiting("default"):
            return capture(recorder, forward)

    monkeypatch.setattr(torch.Tensor, "cpu", copy_and_count)
    monkeypatch.setattr(BlockDecoder, "_take_step", take_watched_step)
    monkeypatch.setattr(forward_graphs.CudaCapture, "__call__", capture_and_wait)
    engine, _ = generate(student, **settings)
    assert num_copies == engine.statistics.num_forwards


@contextlib.contextmanager
def waiting(mode: str):
    """What PyTorch does where the host waits for the GPU: `default`, nothing; `error`, fail."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
