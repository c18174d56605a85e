"""Qwen2.5 and SDAR on Megatron give the logits that `transformers` gives, and convert there and back bit for bit.

`transformers` does not know SDAR. An SDAR here has the tensors of a Qwen3, so the oracle is that Qwen3 under SDAR's
pattern of attention.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_opdlm.config.schema import RolloutConfig, StudentConfig, TeacherConfig
from tests.ranks import run_on_ranks
from tests.references import load_reference, two_stream_logits
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.tiny_relatives import MASK_TOKEN, edit_json, make_tiny_qwen2, make_tiny_sdar
from tests.worlds import LAYOUTS, PIPELINE_LAYOUTS, gathered_logits, layout, load_student, load_teacher, tiny_config

TOLERANCE = 1e-4
LENGTHS_B = torch.tensor([12, 8])
TEACHERS = ("Qwen2.5", "Qwen2.5, tied")
STUDENTS = (*TEACHERS, "SDAR")
EVERY_LAYOUT = LAYOUTS | {"2 stages": PIPELINE_LAYOUTS["2 stages"]}
CONVERTING = ("tensor parallel 1", "tensor parallel 2")
"""Layouts under which checkpoints are written."""


def token_ids() -> torch.Tensor:
    return torch.randint(0, 49, (2, 12), generator=torch.Generator().manual_seed(1))


def noisy_ids(mask_token_id: int) -> torch.Tensor:
    return token_ids().masked_fill(torch.arange(12) % 3 != 0, mask_token_id)


@torch.no_grad()
def teacher_logits(folder: Path, parallel) -> torch.Tensor:
    with layout(parallel) as groups:
        model = load_teacher(tiny_config(folder, parallel=parallel), groups)
        return gathered_logits(model, model(token_ids(), torch.arange(12), None))


@torch.no_grad()
def student_logits(folder: Path, parallel) -> tuple[torch.Tensor, int]:
    """Of the clean rows, then of the noisy ones; and the id of the mask token."""
    with layout(parallel) as groups:
        config = tiny_config(folder, parallel=parallel, backend="aten", rollout=RolloutConfig(block_size=4))
        model, special = load_student(config, groups)
        streams = torch.cat([token_ids(), noisy_ids(special.mask_token_id)])
        return gathered_logits(model, model(streams, torch.arange(12), LENGTHS_B)), special.mask_token_id


def every_case(rank: int, folders: dict[str, Path], layouts: list[str], root: Path) -> dict[tuple, torch.Tensor]:
    """Logits by layout, model and role; also writes a Megatron checkpoint of each under tensor parallelism."""
    from megatron_opdlm.checkpointing.conversion import hf_to_megatron

    results = {}
    for name in layouts:
        for role, models in (("student", STUDENTS), ("teacher", TEACHERS)):
            for model in models:
                logits = student_logits if role == "student" else teacher_logits
                results[name, model, role] = logits(folders[model], EVERY_LAYOUT[name])
                if name in CONVERTING:
                    with layout(LAYOUTS[name]):
                        hf_to_megatron(
                            str(folders[model]),
                            root / f"{role} {model} {name}",
                            role=role,
                            dtype=None,
                            mask_token=MASK_TOKEN,
                            tensor_model_parallel_size=LAYOUTS[name].tensor_model_parallel_size,
                        )
    return results


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("relatives")


@pytest.fixture(scope="module")
def folders(root) -> dict[str, Path]:
    return {
        "Qwen2.5": make_tiny_qwen2(root / "qwen2", seed=1),
        "Qwen2.5, tied": make_tiny_qwen2(root / "qwen2-tied", tie=True, seed=2),
        "Qwen3": make_tiny_qwen3(root / "qwen3", seed=3),
        "SDAR": make_tiny_sdar(root / "sdar", root / "qwen3"),
    }


@pytest.fixture(scope="module")
def results(root, folders, world_of_one) -> dict[tuple, torch.Tensor]:
    one_layout, *two_layouts = EVERY_LAYOUT
    return every_case(0, folders, [one_layout], root) | run_on_ranks(every_case, 2, folders, two_layouts, root)[0]


def reference_of(folders: dict[str, Path], model: str):
    return load_reference(folders["Qwen3" if model == "SDAR" else model])


@pytest.mark.parametrize("model", TEACHERS)
@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_teacher_logits_equal_those_of_transformers(folders, results, name, model):
    with torch.no_grad():
        expected = reference_of(folders, model)(input_ids=token_ids()).logits
    assert (results[name, model, "teacher"][..., : expected.shape[-1]] - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("model", STUDENTS)
@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_student_logits_of_both_streams_equal_one_masked_sequence_of_transformers(folders, results, name, model):
    actual, mask_token_id = results[name, model, "student"]
    with torch.no_grad():
        streams = two_stream_logits(reference_of(folders, model), token_ids(), noisy_ids(mask_token_id), LENGTHS_B, 4)
    expected, is_real = torch.cat(streams), (torch.arange(12) < LENGTHS_B[:, None]).repeat(2, 1)
    assert (actual[..., : expected.shape[-1]] - expected)[is_real].abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("role", "model"), [("student", model) for model in STUDENTS] + [("teacher", model) for model in TEACHERS]
)
@pytest.mark.parametrize("name", CONVERTING)
def test_there_and_back_is_bit_exact(folders, results, root, tmp_path, name, role, model):
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    megatron_to_hf(root / f"{role} {model} {name}", tmp_path / "back", dtype=None)
    actual, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", folders[model]))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[tensor], expected[tensor]) for tensor in expected)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (folders[model], tmp_path / "back"))
    if role == "student":
        before |= {"mask_token_id": results[name, model, "student"][1]}
    assert after == before


def test_an_sdar_keeps_the_mask_token_it_was_trained_with_and_the_code_it_came_with(folders, results, root, tmp_path):
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf
    from megatron_opdlm.data.tokenizer import load_tokenizer

    mask_token_id = results["tensor parallel 1", "SDAR", "student"][1]
    assert mask_token_id == load_tokenizer(folders["SDAR"]).mask_token_id
    megatron_to_hf(root / "student SDAR tensor parallel 1", tmp_path / "back", dtype=None)
    for module in folders["SDAR"].glob("*.py"):
        assert (tmp_path / "back" / module.name).read_bytes() == module.read_bytes()
    assert load_tokenizer(tmp_path / "back").mask_token_id == mask_token_id


def test_the_mask_token_id_of_a_config_wins_over_the_setting(folders, tmp_path):
    from megatron_opdlm.checkpointing.student_and_teacher import open_student

    folder = make_tiny_sdar(tmp_path / "sdar", folders["Qwen3"])
    edit_json(folder / "config.json", mask_token_id=51)
    assert open_student(StudentConfig(hf=str(folder), mask_token="<|OTHER|>")).special.mask_token_id == 51


def test_an_sdar_without_its_mask_token_is_refused(folders):
    from megatron_opdlm.checkpointing.student_and_teacher import open_student

    with pytest.raises(ValueError, match=r"student.mask_token \(<\|OTHER\|>\) must be the mask token that .*/sdar was"):
        open_student(StudentConfig(hf=str(folders["SDAR"]), mask_token="<|OTHER|>"))


def test_an_sdar_is_refused_as_a_teacher(folders, tmp_path):
    from megatron_opdlm.checkpointing.conversion import hf_to_megatron
    from megatron_opdlm.checkpointing.student_and_teacher import open_student, open_teacher

    folder, rule = str(folders["SDAR"]), "block-diffusion model .* a teacher must be autoregressive"
    with pytest.raises(ValueError, match=rf"teacher\.hf .*{rule}"):
        open_teacher(TeacherConfig(hf=folder), open_student(StudentConfig(hf=folder)))
    with pytest.raises(ValueError, match=rf"--hf .*{rule}"):
        hf_to_megatron(folder, tmp_path / "out", role="teacher", dtype=None, mask_token=MASK_TOKEN)
    assert not (tmp_path / "out").exists()
