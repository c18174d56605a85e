"""FP8 is refused where it cannot be had, entered in training only, and its delayed scales survive a resume.

No FP8 product runs here: what stands in for Transformer Engine are records of what Megatron asks of it.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from megatron_opdlm.config.schema import ParallelConfig
from megatron_opdlm.models.build import transformer_config
from megatron_opdlm.models.fp8 import (
    Machine,
    check_fp8,
    fp8_settings,
    is_module_state,
    load_scaling_state,
    scaling_state,
    this_machine,
    without_fp8,
)
from megatron_opdlm.models.qwen3 import Mixture, Qwen3Architecture
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, load_student, tiny_config

H100 = Machine(compute_capability=(9, 0), cuda=(12, 9), has_transformer_engine=True)
QWEN3 = Qwen3Architecture(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40960,
    tie_word_embeddings=True,
    dtype="bfloat16",
)
RECIPES = ("delayed", "tensorwise", "blockwise")


def config_of(recipe: str, attention: bool = False, **overrides):
    settings = fp8_settings(recipe, attention) | overrides
    return transformer_config(QWEN3, parallel=ParallelConfig(), dtype="bfloat16", overrides=settings)


def check(recipe: str = "tensorwise", *, machine=H100, architecture=QWEN3, parallel=None, layers="transformer_engine"):
    check_fp8(
        "precision.fp8", recipe, architecture, parallel or ParallelConfig(), transformer_impl=layers, machine=machine
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_on_an_h100_with_transformer_engine(recipe):
    check(recipe)
    for size in (2, 4, 8):
        check(recipe, parallel=ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=True))


@pytest.mark.parametrize(
    ("recipe", "machine", "expected"),
    [
        ("delayed", {"compute_capability": None}, "precision.fp8 (delayed) needs a GPU, and this machine has none"),
        ("delayed", {"compute_capability": (8, 0)}, "needs a GPU of compute capability 8.9 or higher, not 8.0"),
        ("tensorwise", {"compute_capability": (8, 6)}, "needs a GPU of compute capability 8.9 or higher, not 8.6"),
        ("blockwise", {"compute_capability": (8, 9)}, "needs a GPU of compute capability 9.0 or higher, not 8.9"),
        ("blockwise", {"cuda": (12, 8)}, "needs a PyTorch built with CUDA 12.9 or newer, not 12.8"),
        ("delayed", {"has_transformer_engine": False}, "needs Transformer Engine, which cannot be imported; try pip"),
    ],
)
def test_a_machine_without_it_is_refused_with_what_is_missing(recipe, machine, expected):
    with pytest.raises(ValueError) as refusal:
        check(recipe, machine=dataclasses.replace(H100, **machine))
    assert expected in str(refusal.value)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_scales_of_whole_tensors_do_with_ada_and_older_cuda(recipe):
    check(recipe, machine=dataclasses.replace(H100, compute_capability=(8, 9), cuda=(12, 1)))


def test_megatrons_local_layers_are_refused():
    with pytest.raises(ValueError, match=r"needs transformer.transformer_impl \(local\) to be transformer_engine"):
        check(layers="local")


def test_experts_have_a_width_of_their_own_and_no_delayed_scales():
    mixture = Mixture(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=768, norm_topk_prob=True)
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    architecture = dataclasses.replace(QWEN3, intermediate_size=1, mixture=mixture)
    check("tensorwise", architecture=architecture, parallel=parallel)
    narrow = dataclasses.replace(architecture, mixture=dataclasses.replace(mixture, moe_intermediate_size=48))
    check("tensorwise", architecture=narrow, parallel=dataclasses.replace(parallel, expert_tensor_parallel_size=1))
    with pytest.raises(ValueError, match="needs moe_intermediate_size, 24 on each of 2 tensor-parallel ranks"):
        check("tensorwise", architecture=narrow, parallel=parallel)
    with pytest.raises(ValueError, match=r"precision.fp8 \(delayed\) needs a dense model"):
        check("delayed", architecture=architecture, parallel=parallel)


def test_the_extra_state_of_each_of_a_modules_experts_stays_out_of_checkpoints():
    for name in ("_extra_state", "_extra_state7", "_extra_state12"):
        assert is_module_state(f"decoder.layers.0.mlp.experts.linear_fc1.{name}")
    assert not is_module_state("decoder.layers.0.mlp.experts.linear_fc1.weight7")


@pytest.mark.parametrize(
    ("change", "size", "expected"),
    [
        ({"hidden_size": 1000}, 1, "needs hidden_size, 1000 on each of 1 tensor-parallel ranks"),
        ({"intermediate_size": 3088}, 2, "needs intermediate_size, 1544 on each of 2 tensor-parallel ranks"),
        (
            {"head_dim": 4, "num_attention_heads": 4, "num_key_value_heads": 1},
            1,
            "needs (num_attention_heads + 2 num_key_value_heads) x head_dim, 24 on each of 1 tensor-parallel ranks",
        ),
        ({"head_dim": 12}, 8, "needs num_attention_heads x head_dim, 24 on each of 8 tensor-parallel ranks"),
    ],
)
def test_weights_whose_sides_are_no_multiples_of_16_on_a_rank_are_refused(change, size, expected):
    with pytest.raises(ValueError) as refusal:
        check(
            architecture=dataclasses.replace(QWEN3, **change), parallel=ParallelConfig(tensor_model_parallel_size=size)
        )
    assert expected in str(refusal.value) and str(refusal.value).endswith("to be a multiple of 16")


def test_blockwise_parts_of_a_sequence_parallel_row_need_whole_blocks_of_the_hidden_size():
    narrow = dataclasses.replace(QWEN3, hidden_size=1040)
    for parallel in (ParallelConfig(), ParallelConfig(tensor_model_parallel_size=2)):
        check("blockwise", architecture=narrow, parallel=parallel)
    with pytest.raises(ValueError, match=r"needs hidden_size, 1040 .* multiple of 128"):
        parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
        check("blockwise", architecture=narrow, parallel=parallel)


def test_off_asks_for_nothing():
    check("off", machine=this_machine(), layers="local")
    assert fp8_settings("off", attention=False) == {}


@pytest.mark.parametrize(("recipe", "format"), [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3")])
def test_megatron_takes_the_settings_of_every_recipe(recipe, format):
    config = config_of(recipe, attention=True)
    assert (config.fp8, config.fp8_recipe, config.fp8_dot_product_attention) == (format, recipe, True)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")


def test_the_recipe_may_override_the_history_of_delayed_scaling():
    config = config_of("delayed", fp8_amax_history_len=16)
    assert config.fp8 == "hybrid" and config.fp8_amax_history_len == 16


def fp8_students_regions(folder, recipe: str, monkeypatch, run) -> int:
    """How often a student with this recipe enters Megatron's FP8 context in `run(model)`; 2 layers, on the CPU."""
    from megatron.core.transformer import transformer_block

    entered = []

    @contextlib.contextmanager
    def record(config, layer_no=-1, is_init=False):
        if not is_init:
            entered.append(layer_no)
        yield

    monkeypatch.setattr(transformer_block, "get_fp8_context", record)
    with layout(ParallelConfig()) as groups:
        model, _ = load_student(tiny_config(folder, transformer=fp8_settings(recipe)), groups)
        entered.clear()
        run(model)
        assert model.config.fp8
    return len(entered)


@pytest.mark.parametrize(("recipe", "regions"), [("delayed", 1), ("tensorwise", 2), ("blockwise", 2)])
def test_training_runs_in_fp8_and_rollout_does_not(tmp_path, world_of_one, monkeypatch, recipe, regions):
    from megatron_opdlm.rollout.forward import cached_forward
    from megatron_opdlm.rollout.kv_cache import KeyValueCache, QueryTokens, attached
    from megatron_opdlm.rollout.paged_attention import Heads, SdpaPagedAttention

    folder = make_tiny_qwen3(tmp_path)
    positions, cpu = torch.arange(4), torch.device("cpu")

    def train(model) -> None:
        model(torch.zeros(2, 4, dtype=torch.long), positions, torch.tensor([4]))

    def roll_out(model) -> None:
        cache = KeyValueCache(1, SdpaPagedAttention(4, Heads(2, 2), 4, torch.float32, cpu), cpu)
        tokens = QueryTokens(positions, torch.tensor([0]), torch.tensor([4]), torch.tensor([[0]]))
        with attached(model, cache), torch.no_grad():
            for _ in cached_forward(model, cache, cache.place(tokens)):
                pass

    assert fp8_students_regions(folder, recipe, monkeypatch, train) == regions
    assert fp8_students_regions(folder, recipe, monkeypatch, roll_out) == 0


def test_fp8_is_on_again_after_a_forward_that_failed():
    model = torch.nn.Module()
    model.config = config_of("delayed")
    with pytest.raises(KeyError), without_fp8(model):
        assert model.config.fp8 is None
        raise KeyError
    assert model.config.fp8 == "hybrid"


class Scales:
    """Scales of the tensors of one direction, as Transformer Engine's DelayedScalingRecipeState has them."""

    def __init__(self, num_tensors: int) -> None:
        self.scale = torch.ones(num_tensors)
        self.amax_history = torch.zeros(4, num_tensors)


class ScaledLinear(torch.nn.Linear):
    """The parts of a linear layer of Transformer Engine that hold delayed scales."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.fp8_meta: dict = {}

    def init_fp8_meta_tensors(self, recipe: object) -> None:
        for direction, per_product in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            self.fp8_meta[direction] = Scales(per_product * self.fp8_meta["num_gemms"])

    def reset_fp8_meta_tensors(self, tensors: dict) -> None:
        for direction, (scale, history) in tensors.items():
            self.fp8_meta[direction].scale.copy_(scale)
            self.fp8_meta[direction].amax_history.copy_(history)


def scaled_model(recipe: str = "delayed", calibrated: bool = False) -> torch.nn.Module:
    model = torch.nn.Module()
    model.config = config_of(recipe)
    model.first, model.second, model.norm = ScaledLinear(), ScaledLinear(), torch.nn.LayerNorm(2)
    for place, layer in enumerate((model.first, model.second) if calibrated else ()):
        layer.fp8_meta["num_gemms"] = 1
        layer.init_fp8_meta_tensors(None)
        layer.fp8_meta["scaling_fwd"].scale[1] = 7.0 + place
        layer.fp8_meta["scaling_bwd"].amax_history[2, 1] = 0.5 + place
    return model


def test_delayed_scales_survive_saving_and_loading():
    state, resumed = scaling_state(scaled_model(calibrated=True)), scaled_model()
    assert {tuple(tensor.shape) for tensor in state.values()} == {(3,), (4, 3), (2,), (4, 2)}
    load_scaling_state(resumed, state)
    assert resumed.first.fp8_meta["scaling_fwd"].scale.tolist() == [1, 7, 1]
    assert resumed.second.fp8_meta["scaling_bwd"].amax_history[2].tolist() == [0, 1.5]
    again = scaling_state(resumed)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


def test_saved_scales_are_copies():
    model = scaled_model(calibrated=True)
    state = scaling_state(model)
    model.first.fp8_meta["scaling_fwd"].scale.zero_()
    assert state["first.scaling_fwd.scale"].tolist() == [1, 7, 1]


def test_only_delayed_scaling_has_scales_to_keep():
    state = scaling_state(scaled_model(calibrated=True))
    assert scaling_state(scaled_model("tensorwise", calibrated=True)) == {}
    for model in (scaled_model("tensorwise"), scaled_model("off")):
        load_scaling_state(model, state)
        assert model.first.fp8_meta == {}
    fresh = scaled_model()
    load_scaling_state(fresh, {})  # of a checkpoint that was written without FP8
    assert fresh.first.fp8_meta == {} and scaling_state(fresh) == {}
