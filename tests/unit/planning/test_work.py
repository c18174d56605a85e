"""FLOPs against PyTorch's counter on a model that computes what may be attended and nothing else; messages by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_opdlm.config.schema import Config, DataConfig, ParallelConfig, RolloutConfig, TrainingConfig
from megatron_opdlm.observability import throughput
from megatron_opdlm.observability.hardware import GPUS
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.memory import Models
from megatron_opdlm.planning.published import published
from megatron_opdlm.planning.rates import Rates, message_seconds
from megatron_opdlm.planning.work import layer_messages, model_shape, optimizer_messages, step_flops
from megatron_opdlm.planning.workload import Workload

K, PROMPT, RESPONSE = 4, 8, 24
BLOCKS = [slice(begin, begin + K) for begin in range(0, PROMPT + RESPONSE, K)]


def attend_visible(query, key, value, keys_of_query: list[int]):
    """Each query with as many keys as it may attend, from the first one. `[B, heads, T, D]` in and out.

    Where there are fewer, as if behind a cache, they stand for those in it too.
    """
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    outs = []
    for place, num_keys in enumerate(keys_of_query):
        visible = torch.arange(num_keys) % key.shape[2]
        scores = query[:, :, place : place + 1] @ key[:, :, visible].transpose(2, 3)
        outs.append(scores.softmax(-1) @ value[:, :, visible])
    return torch.cat(outs, dim=2)


@pytest.fixture
def counted(monkeypatch):
    """(shape, count): FLOPs of a forward over so many rows and positions, with logits at some, and of its backward."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    visible: list[int] = []

    def attention(module, query, key, value, mask, **_):
        return attend_visible(query, key, value, visible).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "visible_keys", attention)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=False,
            attn_implementation="visible_keys",
        )
    )
    shape = throughput.ModelShape(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=8,
        ffn_hidden_size=80,
        vocab_size=96,
    )

    def count(num_rows: int, keys_of_query: list[int], num_logits: int, backward: bool) -> int:
        visible[:] = keys_of_query
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            hidden = model.model(torch.zeros(num_rows, len(keys_of_query), dtype=torch.long), use_cache=False)[0]
            logits = model.lm_head(hidden.flatten(0, 1)[:num_logits])
            if backward:
                logits.sum().backward()
        return counter.get_total_flops()

    return shape, count


def test_the_teacher_and_the_student_take_as_many_flops_as_pytorch_counts(counted):
    shape, count = counted
    num_tokens, trained = PROMPT + RESPONSE, 15
    block_causal = [block.stop for block in BLOCKS for _ in range(K)]
    by_torch = count(1, list(range(1, num_tokens + 1)), trained, backward=False)
    assert throughput.teacher_flops(shape, num_tokens, trained) == pytest.approx(by_torch, rel=0.02)
    by_torch = count(2, block_causal, trained, backward=True)  # both streams have as many pairs
    assert throughput.student_training_flops(shape, num_tokens, trained, K) == pytest.approx(by_torch, rel=0.02)


def test_a_rollout_takes_as_many_flops_as_its_forwards_one_by_one(counted):
    shape, count = counted
    steps, total = [1, 3, 2, 4, 2, 1], 0
    for step_count, block in zip(steps, BLOCKS[2:], strict=True):
        total += step_count * count(1, [block.stop] * K, K, backward=False)
    cached = [block.stop for block in BLOCKS[:-1] for _ in range(K)]
    total += count(1, cached, 0, backward=False)
    ours = throughput.rollout_flops(shape, PROMPT, steps, K * sum(steps), K)
    assert ours == pytest.approx(total, rel=0.02)


def config(**training) -> Config:
    return Config(
        data=DataConfig(max_prompt_tokens=64),
        rollout=RolloutConfig(max_new_tokens=400),
        training=TrainingConfig(**training),
    )


def test_a_step_is_its_sequences_and_recompute_is_one_more_forward_of_the_layers():
    models = Models(published("qwen3-0.6b"), published("qwen3-8b"))
    settings = config(recompute="full")
    workload = Workload.of(settings, prompt_tokens=40, response_tokens=120, tokens_per_step=2.0)
    flops = step_flops(models, settings, workload)
    student, teacher = model_shape(models.student), model_shape(models.teacher)
    trained = 90  # two steps a block: (2 + 1) / 4 of the response is masked
    assert flops.student == 128 * throughput.student_training_flops(student, 160, trained, 4)
    assert flops.teacher == 128 * throughput.teacher_flops(teacher, 160, trained)
    assert flops.rollout == 128 * throughput.rollout_flops(student, 40, [2] * 30, 180, 4)
    layers = throughput.student_training_flops(student, 160, 0, 4) / 3
    assert flops.recompute == 128 * layers


def test_part_of_a_denoising_step_costs_part_of_it():
    models, settings = Models(published("qwen3-0.6b"), None), config()
    sizes = {"prompt_tokens": 40, "response_tokens": 120}
    two, four, between = (
        step_flops(models, settings, Workload.of(settings, **sizes, tokens_per_step=tokens)).rollout
        for tokens in (2.0, 1.0, 1.6)
    )
    assert two < between < four


def test_messages_of_a_layer_worked_out_by_hand():
    architecture = published("qwen3-30b-a3b")
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2, expert_model_parallel_size=4
    )
    layout = Layout.of(parallel, 16)
    messages = layer_messages(architecture, layout, 1000, itemsize=2)
    sent = {message.name: message.num_bytes for message in messages}
    assert sent["tensor"] == 2 * 1 / 2 * 1000 * 2048 * 2  # attention's: gathered and scattered, half by each of two
    assert sent["context"] == 1000 * (32 + 4 + 4 + 32) / 2 * 128 * 2 / 2  # half of all heads' tensors change rank
    assert sent["expert"] == 2 * 500 * 8 * 2048 * 2 * 3 / 4  # there and back, to three ranks of four
    assert sent["expert tensor"] == 2 * 500 * 8 * 2048 * 2  # copies to the other half of their experts, outputs back
    whole = replace(layout, expert_tensor=1)
    assert "expert tensor" not in {message.name for message in layer_messages(architecture, whole, 1000, itemsize=2)}


@pytest.mark.parametrize(("is_parallel", "num_collectives"), [(False, 2), (True, 4)])
def test_a_dense_layer_waits_for_two_reductions_or_as_gatherings_and_scatterings_four(is_parallel, num_collectives):
    parallel = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=is_parallel)
    layout, h100 = Layout.of(parallel, 4), GPUS["h100-80gb"]
    (message,) = layer_messages(published("qwen3-8b"), layout, 1000, itemsize=2)
    assert message.num_bytes == 2 * (2 * 3 / 4) * 1000 * 4096 * 2
    rates = Rates(message_latency=1.0, network=1.0)
    waited = message_seconds(replace(message, num_bytes=0), layout, h100, rates)
    assert waited == num_collectives


def test_gradients_and_weights_travel_once_an_optimizer_step():
    models, settings = Models(published("qwen3-8b"), None), config()
    to_reduce, to_gather = optimizer_messages(models, settings, Layout.of(ParallelConfig(), 8), stage=0)
    assert sum(message.num_bytes for message in to_reduce) == pytest.approx(8_190_735_360 * 4 * 7 / 8, rel=1e-4)
    assert sum(message.num_bytes for message in to_gather) == pytest.approx(8_190_735_360 * 2 * 7 / 8, rel=1e-4)


def test_rings_over_servers_use_the_network_card_of_every_member():
    h100, parallel = GPUS["h100-80gb"], ParallelConfig(tensor_model_parallel_size=2)
    layout = Layout.of(parallel, 64)
    assert layout.ring_bandwidth(1, 2, h100) == 450e9
    assert layout.ring_bandwidth(2, 32, h100) == 4 * 50e9
    assert layout.ring_bandwidth(8, 8, h100) == 50e9
    assert layout.exchange_bandwidth(1, 16, h100) == 100e9  # half of the partners are in the same server
