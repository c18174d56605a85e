"""What decoding leaves out of Megatron's layers changes no number: the oracle is Megatron's own way, or every token."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_opdlm.config.schema import ParallelConfig
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, load_student, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def student(folder, world_of_one):
    with layout(ParallelConfig()) as groups:
        yield load_student(tiny_config(folder), groups)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_turn_bit_for_bit_as_in_megatron(dtype):
    from megatron_opdlm.models.rotary import Rotation  # isort: skip  the CPU seam precedes megatron.core
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    torch.manual_seed(0)
    angles_TD = (torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.3, 0.1])).repeat(1, 2)
    query_TND, key_TGD = torch.randn(5, 4, 6, dtype=dtype), torch.randn(5, 2, 6, dtype=dtype)
    for turned, plain in zip(Rotation.by(angles_TD, dtype).of(query_TND, key_TGD), (query_TND, key_TGD), strict=True):
        expected = _apply_rotary_pos_emb_bshd(plain[:, None], angles_TD[:, None, None])[:, 0]
        assert torch.equal(turned, expected)


def test_linear_layers_give_the_same_with_gradients_and_without(student):
    layer = student.chunks[0].decoder.layers[0]
    for linear in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj, layer.mlp.linear_fc1):
        input_SBH = torch.randn(3, 2, linear.weight.shape[1])
        expected, _ = linear(input_SBH)
        assert expected.requires_grad
        with torch.no_grad():
            actual, bias = linear(input_SBH)
        assert bias is None
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-6, atol=1e-6)


def test_the_last_layer_works_on_tokens_that_are_read_alone(student):
    """Two sequences: the first one commits block 0 and denoises block 1, where two places are masked."""
    from megatron_opdlm.rollout.kv_cache import QueryTokens

    whole = QueryTokens(torch.arange(12), torch.tensor([0, 0]), torch.tensor([8, 4]), torch.tensor([[1], [2]]))
    read_N = torch.tensor([5, 7, 9])
    hidden_TH, rows = decoded(student, whole)
    assert rows == [12] * len(student.chunks[0].decoder.layers)
    hidden_NH, rows = decoded(student, dataclasses.replace(whole, read_N=read_N))
    assert rows == [12] * (len(rows) - 1) + [3]
    torch.testing.assert_close(hidden_NH, hidden_TH[read_N], rtol=1e-5, atol=1e-6)


def decoded(model, tokens) -> tuple[torch.Tensor, list[int]]:
    """The outputs of a forward, and how many tokens the MLP of each layer had."""
    from megatron_opdlm.rollout.forward import cached_forward
    from megatron_opdlm.rollout.kv_cache import KeyValueCache, attached
    from megatron_opdlm.rollout.paged_attention import SdpaPagedAttention

    heads_per_group = model.config.num_attention_heads // model.config.num_query_groups
    cache = KeyValueCache(3, SdpaPagedAttention(4, heads_per_group, 8, torch.float32, CPU), CPU)
    rows = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        for layer in model.chunks[0].decoder.layers
    ]
    with attached(model, cache), torch.no_grad():
        work = cached_forward(model, cache, cache.place(tokens))
        with pytest.raises(StopIteration) as end:
            next(work)
    for hook in hooks:
        hook.remove()
    return end.value.value, rows


def test_trajectories_may_be_saved_for_a_backward_pass(student):
    from megatron_opdlm.config.schema import RolloutConfig
    from megatron_opdlm.data.prompts import Prompt
    from megatron_opdlm.data.special_tokens import SpecialTokens
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    special = SpecialTokens(vocab_size=41, mask_token_id=40, end_token_ids=(5,), pad_token_id=0)
    engine = RolloutEngine(student, RolloutConfig(block_size=4), special, seed=0)
    (trajectory,) = engine.generate([RolloutTask(Prompt(0, (1, 2, 3)), max_new_tokens=4)], step=0)
    weight_V = torch.ones(41, requires_grad=True)
    (weight_V[trajectory.terminal_ids_T].sum() + (weight_V[0] * trajectory.log_probs_R).sum()).backward()
    assert weight_V.grad.sum() == len(trajectory.terminal_ids_T) + trajectory.log_probs_R.sum()
