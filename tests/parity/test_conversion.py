"""HF -> Megatron -> HF gives every tensor back bit for bit; the student gets a mask token on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import LAYOUTS, layout

MASK_TOKEN = "<|MASK|>"
FOLDERS = {
    "untied float32": {},
    "tied float32": {"tie": True},
    "untied bfloat16": {"dtype": torch.bfloat16},
    "tied bfloat16": {"tie": True, "dtype": torch.bfloat16},
    "no spare rows, untied": {"spare_rows": 0},
    "no spare rows, tied bfloat16": {"spare_rows": 0, "tie": True, "dtype": torch.bfloat16},
}
ROLES = ("student", "teacher")
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def convert_all(rank: int, sources: dict[str, Path], root: Path, parallel_name: str) -> None:
    """Each folder to a Megatron checkpoint in each role, under `root/<role> of <folder>`."""
    from megatron_opdlm.checkpointing.conversion import hf_to_megatron

    parallel = LAYOUTS[parallel_name]
    for name, source in sources.items():
        for role in ROLES:
            with layout(parallel):
                hf_to_megatron(
                    str(source),
                    root / f"{role} of {name}",
                    role=role,
                    dtype=None,
                    mask_token=MASK_TOKEN,
                    tensor_model_parallel_size=parallel.tensor_model_parallel_size,
                )


def export(checkpoint: Path, output: Path, dtype: str | None = None) -> Path:
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    megatron_to_hf(checkpoint, output, dtype=dtype)
    return output


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("conversion")


@pytest.fixture(scope="module")
def sources(root) -> dict[str, Path]:
    return {name: make_tiny_qwen3(root / "hf" / name, seed=7, **settings) for name, settings in FOLDERS.items()}


@pytest.fixture(scope="module")
def checkpoints(root, sources, world_of_one) -> Path:
    """Written by a single rank."""
    convert_all(0, sources, root / "one", "tensor parallel 1")
    return root / "one"


@pytest.fixture(scope="module")
def sharded_checkpoints(root, sources) -> Path:
    """Written by two tensor-parallel ranks."""
    run_on_ranks(convert_all, 2, sources, root / "two", "tensor parallel 2")
    return root / "two"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", [name for name in FOLDERS if "spare" not in name])
def test_there_and_back_is_bit_exact(sources, checkpoints, tmp_path, name, role):
    back = export(checkpoints / f"{role} of {name}", tmp_path / "hf")
    assert_same_bits(tensors_of(back), tensors_of(sources[name]))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (sources[name], back))
    if role == "student":
        assert after.pop("mask_token_id") == after["vocab_size"] - FOLDERS[name].get("spare_rows", 3)
    assert after == before


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", FOLDERS)
def test_two_tensor_parallel_ranks_write_the_same_model_as_one(checkpoints, sharded_checkpoints, tmp_path, name, role):
    one = export(checkpoints / f"{role} of {name}", tmp_path / "one")
    two = export(sharded_checkpoints / f"{role} of {name}", tmp_path / "two")
    assert_same_bits(tensors_of(two), tensors_of(one))
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())


@pytest.mark.parametrize("name", [name for name in FOLDERS if "spare" in name])
def test_a_mask_token_without_a_row_gets_the_mean_of_the_others_which_stay_bit_exact(
    sources, checkpoints, tmp_path, name
):
    before, after = tensors_of(sources[name]), tensors_of(export(checkpoints / f"student of {name}", tmp_path / "hf"))
    vocabulary = [tensor for tensor in VOCABULARY if tensor in before]
    assert len(vocabulary) == (1 if FOLDERS[name].get("tie") else 2)
    for tensor in vocabulary:
        old = before[tensor]
        assert len(after[tensor]) == len(old) + 1
        mean = old.double().mean(0).to(old.dtype)
        torch.testing.assert_close(after[tensor][-1], mean, atol=1e-7, rtol=2**-8 if old.dtype.itemsize == 2 else 0)
        after[tensor] = after[tensor][:-1]
    assert_same_bits(after, before)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_students_folder_has_the_mask_token_in_tokenizer_config_and_embedding(checkpoints, tmp_path, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = export(checkpoints / f"student of {name}", tmp_path / "hf")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.mask_token == MASK_TOKEN
    assert model.config.mask_token_id == tokenizer.mask_token_id == tokenizer.convert_tokens_to_ids(MASK_TOKEN)
    assert tokenizer.mask_token_id < len(model.get_input_embeddings().weight) == model.config.vocab_size
    assert model.dtype == FOLDERS[name].get("dtype", torch.float32)


def test_a_teacher_gets_no_mask_token(checkpoints, tmp_path):
    folder = export(checkpoints / "teacher of no spare rows, untied", tmp_path / "hf")
    assert "mask_token_id" not in json.loads((folder / "config.json").read_text())
    assert MASK_TOKEN not in (folder / "tokenizer.json").read_text()


def test_a_students_folder_converts_again_without_growing(checkpoints, tmp_path, world_of_one):
    first = export(checkpoints / "student of no spare rows, untied", tmp_path / "hf")
    convert_all(0, {"it": first}, tmp_path, "tensor parallel 1")
    second = export(tmp_path / "student of it", tmp_path / "again")
    assert_same_bits(tensors_of(second), tensors_of(first))
    assert (second / "config.json").read_text() == (first / "config.json").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_export_rounds_to_the_format_asked_for_and_records_it(sources, checkpoints, tmp_path, dtype):
    folder = export(checkpoints / "teacher of untied float32", tmp_path / "hf", dtype)
    expected = {
        name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors_of(sources["untied float32"]).items()
    }
    assert_same_bits(tensors_of(folder), expected)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


def test_a_folder_in_several_files_is_read_like_one(sources, checkpoints, tmp_path, world_of_one):
    from transformers import AutoModelForCausalLM

    name = "untied float32"
    several = make_tiny_qwen3(tmp_path / "several", seed=7)
    (several / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(sources[name]).save_pretrained(several, max_shard_size="20KB")
    assert (several / "model.safetensors.index.json").is_file() and not (several / "model.safetensors").exists()
    convert_all(0, {"several": several}, tmp_path, "tensor parallel 1")
    back = export(tmp_path / "teacher of several", tmp_path / "hf")
    assert_same_bits(tensors_of(back), tensors_of(sources[name]))
