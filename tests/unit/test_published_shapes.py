"""Every published shape, whole and in shards, against `transformers` and the published parameter counts.

Nothing is allocated: models stand on PyTorch's meta device, and a rank of a tensor-parallel group is one process whose
group is PyTorch's fake one. The table holds the values of the models' `config.json` on huggingface.co, which are also
those of Megatron-Bridge (models/qwen/qwen_provider.py). The counts of Qwen3 are those of keras-hub's presets
(keras_hub/src/models/qwen3/qwen3_presets.py), those of the mixtures what their model cards round; Qwen2.5-7B's is the
7.61B of its model card, SDAR's the 8.83 GB that its weights take in bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_opdlm.config.schema import ParallelConfig
from megatron_opdlm.models.qwen3 import Qwen3Architecture, read_architecture
from megatron_opdlm.observability.throughput import ModelShape, num_active_parameters, num_parameters
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.parameters import rank_parameters
from megatron_opdlm.planning.published import published

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

COLUMNS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
QWEN3 = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "rope_scaling": None,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
}
QWEN2 = {key: value for key, value in QWEN3.items() if key not in ("head_dim", "attention_bias")}
QWEN2_7B = {"model_type": "qwen2", "num_key_value_heads": 4, "vocab_size": 152064, "sliding_window": 131072}
SHAPES = {
    "Qwen/Qwen3-0.6B": (QWEN3, (1024, 3072, 28, 16, True), 596_049_920),
    "Qwen/Qwen3-1.7B": (QWEN3, (2048, 6144, 28, 16, True), 1_720_574_976),
    "Qwen/Qwen3-4B": (QWEN3, (2560, 9728, 36, 32, True), 4_022_468_096),
    "Qwen/Qwen3-8B": (QWEN3, (4096, 12288, 36, 32, False), 8_190_735_360),
    "Qwen/Qwen3-14B": (QWEN3, (5120, 17408, 40, 40, False), 14_768_307_200),
    "Qwen/Qwen3-32B": (QWEN3, (5120, 25600, 64, 64, False), 32_762_123_264),
    "Qwen/Qwen3-30B-A3B": (
        QWEN3_MOE | {"moe_intermediate_size": 768},
        (2048, 6144, 48, 32, False),
        30_532_122_624,
    ),
    "Qwen/Qwen3-235B-A22B": (
        QWEN3_MOE | {"moe_intermediate_size": 1536},
        (4096, 12288, 94, 64, False),
        235_093_634_560,
    ),
    "Qwen/Qwen2.5-7B": (QWEN2 | QWEN2_7B, (3584, 18944, 28, 28, False), 7_615_616_512),
    "JetLM/SDAR-4B-Chat": (QWEN3 | {"model_type": "sdar"}, (2560, 9728, 36, 32, False), 4_411_424_256),
}
ACTIVE = {"Qwen/Qwen3-30B-A3B": 3.3e9, "Qwen/Qwen3-235B-A22B": 22e9}
"""Of the model cards."""
LAYOUTS = [
    (name, size, 1)
    for name in SHAPES
    for size in (1, 2, 4, 8)
    if SHAPES[name][0]["num_key_value_heads"] % size == 0 and name not in ACTIVE
] + [("Qwen/Qwen3-30B-A3B", 1, 8), ("Qwen/Qwen3-30B-A3B", 2, 16), ("Qwen/Qwen3-235B-A22B", 4, 32)]
"""Shape, tensor-parallel size, expert-parallel size."""


def config_json(name: str) -> dict:
    fixed, columns, _ = SHAPES[name]
    return fixed | dict(zip(COLUMNS, columns, strict=True))


@pytest.fixture
def architecture(request, tmp_path) -> Qwen3Architecture:
    (tmp_path / "config.json").write_text(json.dumps(config_json(request.getfixturevalue("name"))))
    return read_architecture(tmp_path)


@functools.cache
def reference_tensors(name: str) -> dict[str, torch.Tensor]:
    """The tensors that `transformers` writes for the shape, by name, on the meta device. To it an SDAR is a Qwen3."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config_json(name)
    config = AutoConfig.for_model(**(values | {"model_type": values["model_type"].replace("sdar", "qwen3")}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return {
            written: tensor for name, whole in model.named_parameters() for written, tensor in as_written(name, whole)
        }


def as_written(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor of a model in memory as it stands in files, where each matrix of each expert is a tensor of its own."""
    layer, is_of_experts, fused = name.partition(".experts.")
    if not is_of_experts:
        yield name, tensor
        return
    halves = ("gate_proj", "up_proj") if fused == "gate_up_proj" else (fused,)
    for expert, matrix in enumerate(tensor.detach()):
        for half, part in zip(halves, matrix.chunk(len(halves)), strict=True):
            yield f"{layer}.experts.{expert}.{half}.weight", part


class MetaFolder:
    """A folder of safetensors that has shapes but no numbers."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.folder, self.tensors = "meta", tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        whole = self.tensors[name].detach()
        return whole[rows] if columns is None else whole[rows, columns]


@contextlib.contextmanager
def last_rank(size: int, num_expert_ranks: int = 1) -> Iterator[tuple[ParallelConfig, ProcessGroupCollection]]:
    """The last rank of these groups, the one whose vocabulary rows may be padding."""
    from megatron_opdlm.parallel.initialize import initialize, parallel_state, shut_down

    parallel = ParallelConfig(
        tensor_model_parallel_size=size, sequence_parallel=size > 1, expert_model_parallel_size=num_expert_ranks
    )
    num_ranks = size * num_expert_ranks
    dist.init_process_group("fake", rank=num_ranks - 1, world_size=num_ranks, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            size, expert_model_parallel_size=num_expert_ranks, create_gloo_process_groups=False
        )
        yield parallel, initialize(parallel, seed=0)
    finally:
        shut_down()


def build_on_meta(architecture: Qwen3Architecture, parallel: ParallelConfig):
    from megatron_opdlm.models.attention.core_attention import CausalCoreAttention
    from megatron_opdlm.models.build import build_model

    with torch.device("meta"):
        return build_model(
            architecture,
            CausalCoreAttention,
            parallel=parallel,
            dtype="bfloat16",
            padded_vocab_size=architecture.padded_vocab_size(128, parallel.tensor_model_parallel_size),
            overrides={},
        )


def num_in_all_shards(parameter: torch.nn.Parameter, size: int, num_expert_ranks: int) -> int:
    size_of_group = size if getattr(parameter, "tensor_model_parallel", False) else 1
    return parameter.numel() * size_of_group * (1 if getattr(parameter, "allreduce", True) else num_expert_ranks)


@pytest.mark.parametrize("name", SHAPES)
def test_the_published_count_is_that_of_transformers_and_of_the_formula(name):
    values = config_json(name)
    is_mixture = values["model_type"] == "qwen3_moe"
    shape = ModelShape(
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        num_attention_heads=values["num_attention_heads"],
        num_query_groups=values["num_key_value_heads"],
        head_dim=128,
        ffn_hidden_size=values["moe_intermediate_size" if is_mixture else "intermediate_size"],
        num_experts=values.get("num_experts", 1),
        num_experts_per_token=values.get("num_experts_per_tok", 1),
        vocab_size=values["vocab_size"],
        has_qk_norm=values["model_type"] != "qwen2",
        has_qkv_bias=values["model_type"] == "qwen2",
    )
    expected = SHAPES[name][2]
    assert sum(parameter.numel() for parameter in reference_tensors(name).values()) == expected
    assert num_parameters(shape, values["tie_word_embeddings"]) == expected
    active = num_active_parameters(shape, values["tie_word_embeddings"])
    assert active == expected if name not in ACTIVE else active == pytest.approx(ACTIVE[name], rel=0.02)


@pytest.mark.parametrize(("name", "size", "num_expert_ranks"), LAYOUTS)
def test_shards_add_up_to_the_published_model_and_its_tensors_fit_them(
    name, size, num_expert_ranks, architecture, monkeypatch
):
    from megatron_opdlm.checkpointing import hf_qwen3

    monkeypatch.setattr(hf_qwen3, "SafetensorsReader", lambda folder: MetaFolder(reference_tensors(name)))
    # without numbers none is infinite
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: torch.ones((), dtype=torch.bool, device="cpu"))
    with last_rank(size, num_expert_ranks) as (parallel, groups):
        model = build_on_meta(architecture, parallel)
        with torch.device("meta"):  # a piece of another shape than its parameter would raise
            hf_qwen3.load_hf_weights(model, Path(), architecture, groups)
        total = sum(num_in_all_shards(parameter, size, num_expert_ranks) for parameter in model.parameters())
    padding = architecture.padded_vocab_size(128, size) - architecture.vocab_size
    num_tables = 1 if architecture.tie_word_embeddings else 2
    assert total == SHAPES[name][2] + num_tables * padding * architecture.hidden_size


@pytest.mark.parametrize(("name", "size", "num_expert_ranks"), LAYOUTS)
def test_a_plan_has_every_parameter_of_a_shard_in_its_order(name, size, num_expert_ranks, architecture):
    with last_rank(size, num_expert_ranks) as (parallel, _):
        elements = [parameter.numel() for parameter in build_on_meta(architecture, parallel).parameters()]
    layout = Layout.of(parallel, size * num_expert_ranks)
    (planned,) = rank_parameters(architecture, layout, architecture.padded_vocab_size(128, size), stage=0)
    assert [parameter.num_elements for parameter in planned] == elements


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("Qwen/Qwen3-")])
def test_plans_by_name_are_of_the_published_shape(name, architecture):
    assert published(name) == architecture


@pytest.mark.parametrize("name", SHAPES)
def test_the_way_back_gives_exactly_the_published_tensors(name, architecture):
    from megatron_opdlm.checkpointing.hf_qwen3 import hf_tensors, layer_table

    num_experts = 1 if architecture.mixture is None else architecture.mixture.num_experts
    with last_rank(1, num_experts) as (parallel, _):
        whole = dict(build_on_meta(architecture, parallel).named_parameters())
    parameter_of = {key: parameter for parameter, (key, _) in layer_table(architecture).items()}

    def read(key: str, layer: int | None) -> torch.Tensor:
        if layer is None:
            return whole[key]
        parameter = f"decoder.layers.{layer}.{parameter_of[key]}"
        if parameter in whole:
            return whole[parameter]
        of_one = whole[parameter.replace(".experts.", ".experts.local_experts.0.")]
        return of_one.expand(num_experts, *of_one.shape)

    back = {hf: tuple(tensor.shape) for hf, tensor in hf_tensors(architecture, read)}
    assert back == {hf: tuple(tensor.shape) for hf, tensor in reference_tensors(name).items()}
