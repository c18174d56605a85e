"""A Qwen3 with experts on Megatron gives the logits of `transformers`, and converts there and back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megatron_opdlm.config.schema import Config, ParallelConfig, RolloutConfig
from tests.ranks import run_on_ranks
from tests.references import load_reference, two_stream_logits
from tests.tiny_moe import make_tiny_moe
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.tiny_relatives import edit_json
from tests.worlds import (
    EXPERT_LAYOUTS,
    LAYOUTS,
    PIPELINE_LAYOUTS,
    gathered_logits,
    layout,
    load_student,
    load_teacher,
    tiny_config,
)

TOLERANCE = 1e-4
LENGTHS_B = torch.tensor([12, 8])
LAYOUTS_OF_TWO = {"sequence parallel 2": LAYOUTS["sequence parallel 2"], "2 stages": PIPELINE_LAYOUTS["2 stages"]} | {
    name: EXPERT_LAYOUTS[name]
    for name in (
        "experts over 2",
        "sequence parallel 2, whole experts",
        "sequence parallel 2, whole experts over 2",
    )
}
LAYOUTS_OF_FOUR = {
    name: EXPERT_LAYOUTS[name]
    for name in ("experts over 4", "sequence parallel 2, experts over 2", "2 stages, experts over 2")
}
EVERY_LAYOUT = ["one process", *LAYOUTS_OF_TWO, *LAYOUTS_OF_FOUR]
MODELS = {"normalised": {"seed": 1}, "not normalised": {"seed": 2, "norm_topk_prob": False}}
MASK_TOKEN = "<|MASK|>"


def token_ids() -> torch.Tensor:
    return torch.randint(0, 49, (2, 12), generator=torch.Generator().manual_seed(1))


def noisy_ids(mask_token_id: int) -> torch.Tensor:
    return token_ids().masked_fill(torch.arange(12) % 3 != 0, mask_token_id)


@torch.no_grad()
def logits_of_both(folder: Path, parallel: ParallelConfig) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The teacher's, the student's (clean rows, then noisy ones), and the id of the mask token.

    Where ranks share experts, each has its own rows: the last row goes to odd data-parallel ranks, both to even ones.
    """
    with layout(parallel) as groups:
        rows = slice(groups.dp.rank() % 2, None)
        teacher = load_teacher(tiny_config(folder, parallel=parallel), groups)
        of_teacher = gathered_logits(teacher, teacher(token_ids()[rows], torch.arange(12), None))
        config = tiny_config(folder, parallel=parallel, backend="aten", rollout=RolloutConfig(block_size=4))
        student, special = load_student(config, groups)
        streams = torch.cat([token_ids()[rows], noisy_ids(special.mask_token_id)[rows]])
        of_student = gathered_logits(student, student(streams, torch.arange(12), LENGTHS_B[rows]))
        return of_teacher, of_student, special.mask_token_id


def convert(folder: Path, output: Path, role: str, size: int) -> None:
    from megatron_opdlm.checkpointing.conversion import hf_to_megatron

    parallel = ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=size > 1)
    with layout(parallel):
        hf_to_megatron(
            str(folder), output, role=role, dtype=None, mask_token=MASK_TOKEN, tensor_model_parallel_size=size
        )


def every_case(rank: int, folders: dict[str, Path], layouts: dict[str, ParallelConfig], root: Path) -> dict:
    """Also writes a Megatron checkpoint of each model and role, by as many tensor-parallel ranks as there are."""
    for model, folder in folders.items():
        for role in ("student", "teacher"):
            size = torch.distributed.get_world_size()
            if size < 4:
                convert(folder, root / f"{role} {model} {size}", role, size)
    return {
        (name, model): logits_of_both(folder, parallel)
        for name, parallel in layouts.items()
        for model, folder in folders.items()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("moe")


@pytest.fixture(scope="module")
def folders(root) -> dict[str, Path]:
    return {name: make_tiny_moe(root / name, **settings) for name, settings in MODELS.items()}


@pytest.fixture(scope="module")
def results(root, folders, world_of_one) -> list[dict]:
    """By rank; ranks that a world lacks repeat its first."""
    one = [every_case(0, folders, {"one process": ParallelConfig()}, root)] * 4
    two = run_on_ranks(every_case, 2, folders, LAYOUTS_OF_TWO, root) * 2
    four = run_on_ranks(every_case, 4, folders, LAYOUTS_OF_FOUR, root)
    return [a | b | c for a, b, c in zip(one, two, four, strict=True)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_logits_of_teacher_and_student_equal_those_of_transformers(folders, results, name, model):
    reference = load_reference(folders[model])
    mask_token_id = results[0][name, model][2]
    with torch.no_grad():
        expected = reference(input_ids=token_ids()).logits
        streams = two_stream_logits(reference, token_ids(), noisy_ids(mask_token_id), LENGTHS_B, 4)
    for rank in results:
        of_teacher, of_student, _ = rank[name, model]
        rows = slice(2 - len(of_teacher), None)
        assert (of_teacher[..., : expected.shape[-1]] - expected[rows]).abs().max() <= TOLERANCE
        is_real = (torch.arange(12) < LENGTHS_B[rows, None]).repeat(2, 1)
        difference = of_student[..., : expected.shape[-1]] - torch.cat([stream[rows] for stream in streams])
        assert difference[is_real].abs().max() <= TOLERANCE


def test_probabilities_that_are_not_normalised_make_another_model(folders):
    """Otherwise the test above could not tell the two kinds apart."""
    with torch.no_grad():
        before = load_reference(folders["not normalised"])(input_ids=token_ids()).logits
        edit_json(folders["not normalised"] / "config.json", norm_topk_prob=True)
        after = load_reference(folders["not normalised"])(input_ids=token_ids()).logits
    edit_json(folders["not normalised"] / "config.json", norm_topk_prob=False)
    assert (before - after).abs().max() > 0.1


@pytest.mark.parametrize("model", MODELS)
def test_gradients_equal_autograd_through_transformers(folders, results, model):
    reference, mask_token_id = load_reference(folders[model]), results[0]["one process", model][2]
    streams = two_stream_logits(reference, token_ids(), noisy_ids(mask_token_id), LENGTHS_B, 4)
    logits_BTV = torch.cat(streams)
    weights_BTV = torch.randn(logits_BTV.shape, generator=torch.Generator().manual_seed(3))
    weights_BTV *= (torch.arange(12) < LENGTHS_B[:, None]).repeat(2, 1)[..., None]  # padding has no say
    (logits_BTV * weights_BTV).sum().backward()
    expected = dict(split_experts({name: parameter.grad for name, parameter in reference.named_parameters()}))
    actual = megatron_gradients(folders[model], weights_BTV)
    assert actual.keys() == expected.keys() and "model.layers.0.mlp.gate.weight" in actual
    for name, gradient in expected.items():
        assert gradient.any() and (actual[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def split_experts(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each expert's matrices by themselves, as files have them."""
    for name, tensor in tensors.items():
        layer, is_of_experts, fused = name.partition(".experts.")
        halves = ("gate_proj", "up_proj") if fused == "gate_up_proj" else (fused,)
        for expert, matrix in enumerate(tensor if is_of_experts else []):
            for half, part in zip(halves, matrix.chunk(len(halves)), strict=True):
                yield f"{layer}.experts.{expert}.{half}.weight", part
        if not is_of_experts:
            yield name, tensor


def megatron_gradients(folder: Path, weights_BTV: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the weighted sum of the student's logits, by the names of Hugging Face's tensors."""
    from megatron_opdlm.checkpointing.hf_qwen3 import hf_tensors, layer_table
    from megatron_opdlm.models.qwen3 import read_architecture

    architecture = read_architecture(folder)
    with layout(ParallelConfig()) as groups:
        student, special = load_student(tiny_config(folder, rollout=RolloutConfig(block_size=4)), groups)
        streams = torch.cat([token_ids(), noisy_ids(special.mask_token_id)])
        logits_BTV = gathered_logits(student, student(streams, torch.arange(12), LENGTHS_B))
        (logits_BTV[..., : weights_BTV.shape[-1]] * weights_BTV).sum().backward()
    by_name = {name: parameter.grad for name, parameter in student.named_parameters()}
    parameter_of = {key: parameter for parameter, (key, _) in layer_table(architecture).items()}

    def read(key: str, layer: int | None) -> torch.Tensor:
        if layer is None:
            return by_name[key]
        name = f"decoder.layers.{layer}.{parameter_of[key]}"
        if name in by_name:
            return by_name[name]
        return torch.stack([by_name[name.replace("experts.", f"experts.local_experts.{e}.")] for e in range(4)])

    return dict(hf_tensors(architecture, read))


@dataclass
class GroupedExperts:
    """A model as `load_hf_weights` sees it: one rank's experts by the names of Transformer Engine's grouped layers."""

    shapes: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        self.weights = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in self.shapes.items()}

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return iter(self.weights.items())


@dataclass
class Group:
    """A process group that is never communicated over."""

    number: int
    length: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.length


def test_transformer_engines_grouped_experts_are_read_by_their_numbers_on_the_rank(folders):
    from megatron_opdlm.checkpointing.hf_qwen3 import load_hf_weights
    from megatron_opdlm.models.qwen3 import read_architecture

    experts, architecture = "decoder.layers.1.mlp.experts", read_architecture(folders["normalised"])
    shapes = {f"{experts}.linear_fc1.weight1": (24, 32), f"{experts}.linear_fc2.weight0": (32, 12)}
    model = GroupedExperts(shapes)
    groups = SimpleNamespace(tp=Group(0, 1), expt_tp=Group(1, 2), ep=Group(1, 2))
    load_hf_weights(model, folders["normalised"], architecture, groups)
    whole = load_file(folders["normalised"] / "model.safetensors")
    gate, up = (whole[f"model.layers.1.mlp.experts.3.{half}_proj.weight"][12:] for half in ("gate", "up"))
    down = whole["model.layers.1.mlp.experts.2.down_proj.weight"][:, 12:]
    first, second = model.weights.values()
    assert first.equal(torch.cat([gate, up])) and second.equal(down)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_is_bit_exact(folders, results, root, tmp_path, model, role, size):
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    megatron_to_hf(root / f"{role} {model} {size}", tmp_path / "back", dtype=None)
    actual, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", folders[model]))
    assert actual.keys() == expected.keys() and "model.layers.1.mlp.experts.3.up_proj.weight" in actual
    assert all(torch.equal(actual[tensor], expected[tensor]) for tensor in expected)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (folders[model], tmp_path / "back"))
    if role == "student":
        before |= {"mask_token_id": results[0]["one process", model][2]}
    assert after == before


def test_a_megatron_checkpoint_of_one_rank_is_read_by_ranks_that_share_its_experts(root, results, folders):
    for name, size in (("experts over 2", 2), ("sequence parallel 2, experts over 2", 4)):
        loaded = run_on_ranks(logits_of_checkpoint, size, root / "teacher normalised 1", name)
        for rank, logits in enumerate(loaded):
            assert torch.equal(logits, results[rank][name, "normalised"][0])


@torch.no_grad()
def logits_of_checkpoint(rank: int, folder: Path, name: str) -> torch.Tensor:
    from megatron_opdlm.checkpointing.pretrained import open_pretrained
    from megatron_opdlm.models.attention.core_attention import CausalCoreAttention
    from megatron_opdlm.models.build import build_model

    parallel, source = EXPERT_LAYOUTS[name], open_pretrained(str(folder), "--checkpoint")
    with layout(parallel) as groups:
        num_rows = source.architecture.padded_vocab_size(128, parallel.tensor_model_parallel_size)
        settings = {"parallel": parallel, "dtype": "float32", "padded_vocab_size": num_rows, "overrides": {}}
        model = build_model(source.architecture, CausalCoreAttention, **settings).freeze()
        source.load_into(model, groups, source.architecture)
        rows = slice(groups.dp.rank() % 2, None)
        return gathered_logits(model, model(token_ids()[rows], torch.arange(12), None))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1 is supported"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; only \[\] is supported"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok \(5\) must lie between 2 and num_local_experts \(4\)"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be a positive int, not 0"),
    ],
)
def test_a_mixture_of_another_kind_is_refused(tmp_path, values, message):
    from megatron_opdlm.models.qwen3 import read_architecture

    folder = make_tiny_moe(tmp_path)
    edit_json(folder / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        read_architecture(folder)


def test_the_number_of_experts_is_read_by_the_name_in_published_folders_too(tmp_path):
    from megatron_opdlm.models.qwen3 import read_architecture

    folder = make_tiny_moe(tmp_path)
    before, values = read_architecture(folder), json.loads((folder / "config.json").read_text())
    values["num_experts"] = values.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(values))
    assert read_architecture(folder) == before and before.mixture.num_experts == 4


def test_experts_to_share_out_are_asked_for_where_no_model_has_any(folders, tmp_path):
    from megatron_opdlm.config.check_architecture import check_experts
    from megatron_opdlm.models.qwen3 import read_architecture

    config = Config(parallel=EXPERT_LAYOUTS["experts over 2"])
    dense, mixture = (read_architecture(folder) for folder in (make_tiny_qwen3(tmp_path), folders["normalised"]))
    check_experts(config, dense, mixture)
    check_experts(Config(), dense, dense)
    with pytest.raises(ValueError, match=r"parallel.expert_model_parallel_size \(2\) must be 1: neither student nor"):
        check_experts(config, dense, dense)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"expert_model_parallel_size": 3}, r"expert_model_parallel_size \(3\) must divide num_experts \(4\)"),
        ({"tensor_model_parallel_size": 2}, r"sequence_parallel \(false\) must be true for a mixture of experts"),
        (
            {"tensor_model_parallel_size": 5, "sequence_parallel": True, "expert_tensor_parallel_size": 5},
            r"tensor_model_parallel_size \(5\) must divide",
        ),
    ],
)
def test_a_layout_that_does_not_fit_the_experts_is_refused(folders, parallel, message):
    from megatron_opdlm.models.build import transformer_config
    from megatron_opdlm.models.qwen3 import read_architecture

    with pytest.raises(ValueError, match=message):
        transformer_config(
            read_architecture(folders["normalised"]), parallel=ParallelConfig(**parallel), dtype="float32", overrides={}
        )
