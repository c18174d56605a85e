"""Forwards that are filled up and replayed give what they give one by one, and nobody waits for the device in a step.

Graphs are recorded operations here, which run again on the same memory without any Python of the model, as CUDA graphs
do; a device is what `tests.fake_device` takes for one.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm.config.schema import ParallelConfig, RolloutConfig
from megatron_opdlm.parallel.device import to_device
from tests.fake_device import DeviceWaits, record
from tests.fake_flash_attn import install_flash
from tests.parity.test_continuous_batching import CASES, PAGE_GIB, assert_same
from tests.parity.test_flash_paged_attention import generate
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, load_student, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def student(folder, world_of_one):
    with layout(ParallelConfig()) as groups:
        yield load_student(tiny_config(folder, rollout=RolloutConfig(stop_token_ids=[5, 17])), groups)


@pytest.fixture
def graphs(monkeypatch):
    """Flash-attention and CUDA graphs as if there were a GPU; what has been captured, as numbers of tokens.

    Sizes are powers of two, so that small forwards are filled up too.
    """
    from megatron_opdlm.rollout import forward_graphs, generation

    captured = []

    def capture(forward):
        replay, hidden_TH = record(forward)
        captured.append(len(hidden_TH))
        return replay, hidden_TH

    install_flash(monkeypatch, "flash-attn 3")
    monkeypatch.setattr(forward_graphs, "filled_up", lambda num_blocks: 1 << (num_blocks - 1).bit_length())
    monkeypatch.setattr(generation, "graphs_refusal", lambda *_: None)
    monkeypatch.setattr(generation, "CudaCapture", lambda: capture)
    return captured


@pytest.mark.parametrize("case", CASES)
def test_replayed_forwards_give_the_same_trajectories(student, graphs, case):
    _, expected = generate(student, attention="sdpa", cuda_graphs=False, **CASES[case])
    assert not graphs
    statistics, actual = generate(student, batch_size=3, **CASES[case])
    assert_same(actual, expected)
    assert statistics.num_replays > statistics.num_forwards // 3
    assert len(graphs) == len(set(graphs)), "a size is captured once"


@pytest.mark.parametrize("settings", [{"batch_size": 2}, {"max_tokens_in_flight": 16}, {"cache_gib": 13 * PAGE_GIB}])
def test_replayed_forwards_do_not_depend_on_the_company(student, graphs, settings):
    _, expected = generate(student, attention="sdpa", cuda_graphs=False, dynamic_threshold=0.1)
    statistics, actual = generate(student, dynamic_threshold=0.1, **settings)
    assert_same(actual, expected)
    assert statistics.num_replays
    assert statistics.metrics().values()["rollout/replay_share"] == statistics.num_replays / statistics.num_forwards


def test_without_the_setting_nothing_is_captured(student, graphs):
    assert generate(student, cuda_graphs=False)[0].num_replays == len(graphs) == 0


def test_only_forwards_of_two_blocks_per_sequence_are_replayed(student, graphs):
    """Two sequences at a time, so forwards of up to four blocks of four; the longest prompt has five blocks."""
    statistics, _ = generate(student, batch_size=2, dynamic_threshold=0.1)
    assert 0 < statistics.num_replays < statistics.num_forwards
    assert max(graphs) <= 16


def test_weights_that_training_changes_in_place_are_those_of_the_next_rollout(student, graphs):
    model, _ = student
    with torch.no_grad():
        model.output_weight.copy_(model.output_weight.flip(1))
    _, expected = generate(student, attention="sdpa", cuda_graphs=False, dynamic_threshold=0.1)
    assert_same(generate(student, dynamic_threshold=0.1)[1], expected)


# --- filling up -------------------------------------------------------------------------------------------------------


def test_sizes_are_few_and_waste_less_than_a_fifth():
    from megatron_opdlm.rollout.forward_graphs import filled_up

    sizes = [filled_up(num) for num in range(1, 257)]
    assert all(num <= size < num * 5 / 4 for num, size in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 28
    assert [filled_up(size) for size in sizes] == sizes


def test_empty_blocks_read_and_write_the_page_of_nobody_alone():
    from megatron_opdlm.rollout.forward_graphs import with_empty_blocks
    from megatron_opdlm.rollout.kv_cache import KeyValueCache, QueryTokens

    attention = SimpleNamespace(page_size=4, lay_out=lambda tokens: tokens)
    tokens = QueryTokens(torch.arange(8), torch.tensor([4]), torch.tensor([8]), torch.tensor([[3, 1, 2]]))
    placed = KeyValueCache(4, attention, CPU).place(with_empty_blocks(tokens, 5, block_size=4))
    assert placed.ids_T.tolist() == [*range(8), *[0] * 12]
    assert placed.positions_T.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, *[0, 1, 2, 3] * 3]
    assert placed.addresses_T.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, *[0, 1, 2, 3] * 3]
    assert placed.layout.page_table_AP.tolist() == [[3, 1, 2], *[[0, 0, 0]] * 3]


def test_graphs_say_what_they_cannot_hold(student):
    from megatron_opdlm.rollout.forward_graphs import graphs_refusal

    def reason(device="cuda", is_capturable=True, num_stages=1, num_experts=None):
        model = SimpleNamespace(
            link=SimpleNamespace(num_stages=num_stages), config=SimpleNamespace(num_moe_experts=num_experts)
        )
        return graphs_refusal(model, SimpleNamespace(is_capturable=is_capturable), torch.device(device))

    assert reason() is None
    assert reason(device="cpu") == "it needs a GPU, the model is on cpu"
    assert "waits for the GPU" in reason(is_capturable=False)
    assert reason(num_stages=2) == "parallel.pipeline_model_parallel_size (2) must be 1"
    assert "expert" in reason(num_experts=8)


# --- waiting ----------------------------------------------------------------------------------------------------------


SAMPLING = {
    "all": {},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "greedy": {"temperature": 0.0},
    "entropy": {"remasking_strategy": "entropy_bounded"},
    "shifted logits": {"logit_shift": "next_token"},
    "autoregressive": {"block_size": 1, "denoising_steps_per_block": 1, "logit_shift": "next_token"},
}


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("attention", ["sdpa", "flash", "flash in graphs"])
def test_a_forward_waits_for_the_device_once_to_see_what_was_drawn(student, graphs, monkeypatch, attention, sampling):
    from megatron_opdlm.rollout.block_decoder import BlockDecoder

    settings = {"attention": attention.split()[0], "cuda_graphs": "graphs" in attention} | SAMPLING[sampling]
    _, expected = generate(student, **settings)
    device, take_step = DeviceWaits(student[0]), BlockDecoder._take_step

    def take_watched_step(decoder, plan):
        with device:
            yield from take_step(decoder, plan)

    monkeypatch.setattr(BlockDecoder, "_take_step", take_watched_step)
    statistics, actual = generate(student, **settings)
    assert device.num_copies == statistics.num_forwards
    assert (statistics.num_replays > 0) == ("graphs" in attention)
    assert_same(actual, expected)


WAITING = {
    "number": lambda x: int(x[0]),
    "condition": lambda x: bool((x > 0).any()),
    "list": lambda x: x.tolist(),
    "mask as an index": lambda x: x[x > 0],
    "values at a mask": lambda x: x.index_put_((x > 0,), x[:2]),
    "places": lambda x: (x > 0).nonzero(),
    "comparison": lambda x: torch.equal(x, x),
    "index on the host": lambda x: x[torch.tensor([0])],
    "copy of a list": lambda x: x + torch.tensor([1, 2, 3], device=CPU),
    "copy that waits": lambda x: torch.zeros(3).to(CPU),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_waits_for_a_device_is_noticed(student, what):
    with DeviceWaits(student[0]):
        x = to_device(torch.tensor([0, 1, 2]), CPU)
        x[to_device(torch.tensor([0]), CPU)] = 0
        x[x > 5] = 1
        with pytest.raises(AssertionError):
            WAITING[what](x)
