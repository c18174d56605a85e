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
    heads_TGJD = torch.randn(5, 2, 3, 6, dtype=dtype)
    expected = _apply_rotary_pos_emb_bshd(heads_TGJD.flatten(1, 2)[:, None], angles_TD[:, None, None])[:, 0]
    assert torch.equal(Rotation.by(angles_TD, dtype).of(heads_TGJD), expected.unflatten(1, (2, 3)))


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


class OtherNorm(torch.nn.Module):
    """What is not our own, as Transformer Engine's."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden):
        return self.norm(hidden)


@pytest.mark.parametrize("is_own", [True, False])
def test_queries_keys_and_values_are_bit_for_bit_those_of_megatron(student, monkeypatch, is_own):
    layer, hidden_T1H = student.chunks[0].decoder.layers[0], torch.randn(5, 1, student.config.hidden_size)
    attention = layer.self_attention
    with torch.no_grad():
        for norm in (attention.q_layernorm, attention.k_layernorm):
            norm.weight.uniform_(0.5, 1.5)
        expected = attention.get_query_key_value_tensors(hidden_T1H)
        if is_own:
            monkeypatch.setattr(attention, "get_query_key_value_tensors", unasked)
        else:
            attention.q_layernorm, attention.k_layernorm = (
                OtherNorm(attention.q_layernorm),
                OtherNorm(attention.k_layernorm),
            )
        heads_TGJD, value_TGD = layer._heads(hidden_T1H)
    actual = heads_TGJD[:, :, :-1].flatten(1, 2), heads_TGJD[:, :, -1], value_TGD
    for ours, megatrons in zip(actual, expected, strict=True):
        assert torch.equal(ours, megatrons[:, 0])


def unasked(*_, **__):
    raise AssertionError("the shorter way goes past this")


def test_the_gated_product_is_bit_for_bit_that_of_megatron(student, monkeypatch):
    layer, hidden_T1H = student.chunks[0].decoder.layers[0], torch.randn(5, 1, student.config.hidden_size)
    with torch.no_grad():
        expected, _ = layer.mlp(hidden_T1H)
        monkeypatch.setattr(layer.mlp, "forward", unasked)
        assert torch.equal(layer._mlp(hidden_T1H)[0], expected)


def test_other_activations_are_left_to_megatron(student, monkeypatch):
    layer, hidden_T1H = student.chunks[0].decoder.layers[0], torch.randn(5, 1, student.config.hidden_size)
    for name, value in (("bias_activation_fusion", True), ("use_te_activation_func", True), ("glu_linear_offset", 1.0)):
        with monkeypatch.context() as patch:
            patch.setattr(layer.config, name, value)
            patch.setattr(layer.mlp, "forward", unasked)
            with pytest.raises(AssertionError, match="shorter way"):
                layer._mlp(hidden_T1H)


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
    from megatron_opdlm.rollout.paged_attention import Heads, SdpaPagedAttention

    num_groups = model.config.num_query_groups
    heads = Heads(num_groups, model.config.num_attention_heads // num_groups)
    cache = KeyValueCache(3, SdpaPagedAttention(4, heads, 8, torch.float32, CPU), CPU)
    rows = []
    hooks = [
        layer.mlp.linear_fc1.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
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


def test_blocks_that_are_committed_together_have_their_pages_side_by_side(student, monkeypatch):
    from megatron_opdlm.config.schema import RolloutConfig
    from megatron_opdlm.data.prompts import Prompt
    from megatron_opdlm.data.special_tokens import SpecialTokens
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask
    from megatron_opdlm.rollout.paged_attention import SdpaPagedAttention

    call, commits = SdpaPagedAttention._call, []

    def record(self, tokens, queries):
        made, is_read = call(self, tokens, queries), torch.isin(queries.tokens_AW, tokens.read_N).any()
        if not is_read and int(queries.first_A.min()) >= 8:  # behind every prompt
            commits.append(made)
        return made

    monkeypatch.setattr(SdpaPagedAttention, "_call", record)
    special = SpecialTokens(vocab_size=41, mask_token_id=40, end_token_ids=(), pad_token_id=0)
    rollout = RolloutConfig(block_size=4, denoising_steps_per_block=4, remasking_strategy="low_confidence_static")
    engine = RolloutEngine(student, rollout, special, seed=0)
    tasks = [
        RolloutTask(Prompt(place, tuple(range(1, 5 + place % 5)) + (9, 10) * (place % 2)), 16) for place in range(12)
    ]
    engine.generate(tasks, step=0)
    assert len(commits) >= 8
    assert all(isinstance(commit.pages, slice) for commit in commits)
