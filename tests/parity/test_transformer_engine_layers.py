"""Transformer Engine's layers and Megatron's local ones are the same model, in memory, in checkpoints, in Hugging Face.

Transformer Engine has no kernel for a CPU, so stand-ins take the places of its modules. They have its names, its fused
norms and its extra state: what is tested is Megatron's own wiring of them, our table of names and our checkpoints.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megatron_opdlm.config.schema import ParallelConfig
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, load_student, load_teacher, tiny_config

LAYERS = ("local", "transformer_engine")


def stand_ins():
    """A provider like Megatron's TESpecProvider, of modules that run on a CPU."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megatron_opdlm.models.rms_norm import RMSNorm

    class ExtraState:
        """Bytes in the state dict, as Transformer Engine's modules have them. Nobody may load any."""

        def get_extra_state(self) -> torch.Tensor:
            return torch.zeros(3, dtype=torch.uint8)

        def set_extra_state(self, state: object) -> None:
            assert state is None, "a checkpoint must not hold extra state"

    class Norm(ExtraState, RMSNorm):
        pass

    class NormLinear(ExtraState, ColumnParallelLinear):
        """Norm and linear layer in one, with the names of TELayerNormColumnParallelLinear's parameters."""

        def __init__(self, input_size: int, *args, config, **kwargs) -> None:
            super().__init__(input_size, *args, config=config, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
            self.eps = config.layernorm_epsilon

        def forward(self, hidden: torch.Tensor, *args, **kwargs):
            normalised = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], self.layer_norm_weight, self.eps)
            return super().forward(normalised, *args, **kwargs)

    class Provider(LocalSpecProvider):
        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return NormLinear

        def layer_norm(self, **_: bool) -> type:
            return Norm

    return Provider, Norm


@pytest.fixture
def transformer_engine(monkeypatch) -> None:
    """Megatron's specs find the stand-ins."""
    from megatron_opdlm.models.layer_specs import gpt_layer_specs

    provider, norm = stand_ins()
    monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", norm, raising=False)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(tmp_path, request):
    return make_tiny_qwen3(tmp_path / "hf", tie=request.param)


def hidden_states_and_gradients(folder, layers: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of both streams of a student; the gradients of a sum by the parameters' keys in a checkpoint."""
    from megatron_opdlm.checkpointing.hf_qwen3 import LAYER

    with layout(ParallelConfig()) as groups:
        model, special = load_student(tiny_config(folder, transformer={"transformer_impl": layers}), groups)
        ids_BT = torch.arange(8).view(1, 8)
        noisy_BT = ids_BT.masked_fill(torch.arange(8) % 3 == 0, special.mask_token_id)
        hidden = model(torch.cat([ids_BT, noisy_BT]), torch.arange(8), torch.tensor([8]))
        (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        *outer, last = name.split(".", 3)
        key = ".".join([*outer, LAYER[last][0] if last in LAYER else last])
        gradients[key] = parameter.grad
    return hidden.detach(), gradients


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_both_kinds_of_layers_load_the_same_folder_and_compute_the_same(folder, world_of_one, transformer_engine):
    (local, local_gradients), (fused, fused_gradients) = (hidden_states_and_gradients(folder, kind) for kind in LAYERS)
    assert_near(fused, local)
    assert fused_gradients.keys() == local_gradients.keys()
    for key, gradient in local_gradients.items():
        if gradient is None:  # of an output layer that the sum does not reach
            assert fused_gradients[key] is None
        else:
            assert_near(fused_gradients[key], gradient)


def test_the_fused_layers_are_those_of_the_specification(folder, world_of_one, transformer_engine):
    with layout(ParallelConfig()) as groups:
        names = dict(load_teacher(tiny_config(folder), groups).named_parameters())
    layer = {name.removeprefix("decoder.layers.0.") for name in names if name.startswith("decoder.layers.0.")}
    assert layer == {
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }


@pytest.mark.parametrize(("written", "read"), [LAYERS, LAYERS[::-1], ("transformer_engine", "transformer_engine")])
def test_a_checkpoint_of_either_kind_of_layers_is_read_into_the_other(
    tmp_path, folder, world_of_one, transformer_engine, written, read
):
    from megatron_opdlm.checkpointing.distributed import load_checkpoint, save_checkpoint

    tie = "lm_head.weight" not in load_file(folder / "model.safetensors")
    other = make_tiny_qwen3(tmp_path / "other", seed=1, tie=tie)
    with layout(ParallelConfig()) as groups:
        first, second = (
            load_student(tiny_config(source, transformer={"transformer_impl": layers}), groups)[0]
            for source, layers in ((folder, written), (other, read))
        )
        assert not torch.equal(first.output_weight, second.output_weight)
        save_checkpoint(tmp_path / "saved", {"model": sharded(first)}, lambda _: None)
        second.load_state_dict(load_checkpoint(tmp_path / "saved", {"model": sharded(second)})["model"])
        expected, actual = by_key(first), by_key(second)
    # 8 parameters in each of 2 layers, the fused gate and up projection as two; embedding, final norm, output layer
    assert expected.keys() == actual.keys() and len(expected) == 2 * 9 + 2 + (not tie)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def sharded(model) -> dict:
    from megatron_opdlm.checkpointing.distributed import METADATA

    return model.sharded_state_dict(metadata=METADATA)


def by_key(model) -> dict[tuple, torch.Tensor]:
    """Everything that goes into a checkpoint, by key and by place in the whole tensor."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = sharded(model)
    apply_factories(state)
    return {(item.key, item.global_offset): item.data for item in nested_values(state)}


def test_a_checkpoint_of_fused_layers_is_exported_bit_for_bit(tmp_path, folder, world_of_one, transformer_engine):
    from megatron_opdlm.checkpointing.conversion import hf_to_megatron, megatron_to_hf

    with layout(ParallelConfig()):
        hf_to_megatron(str(folder), tmp_path / "megatron", role="teacher", dtype=None, mask_token="<|MASK|>")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype=None)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_still_refuses_a_state_without_one_of_its_weights(folder, world_of_one, transformer_engine):
    with layout(ParallelConfig()) as groups:
        model, _ = load_student(tiny_config(folder), groups)
        state = {key: value for key, value in model.state_dict().items() if "extra_state" not in key}
        model.load_state_dict(state)
        del state["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"]
        with pytest.raises(RuntimeError, match=r"decoder.layers.1.mlp.linear_fc1.layer_norm_weight"):
            model.load_state_dict(state)
