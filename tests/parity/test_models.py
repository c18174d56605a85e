"""Student and teacher on Megatron give the logits that `transformers` gives, under every tensor-parallel layout.

The oracle of the student reads `[clean | noisy]` as one sequence under an explicit mask. The tiny Qwen3 has fewer
key-value than query heads, a head dimension that is not hidden size / heads, and norms that are not one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_opdlm.config.schema import RolloutConfig
from tests.ranks import run_on_ranks
from tests.references import load_reference, two_stream_logits
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import LAYOUTS, PIPELINE_LAYOUTS, gathered_logits, layout, load_student, load_teacher, tiny_config

TOLERANCE = 1e-4
BLOCK_SIZES = (4, 8)
BACKENDS = ("dense", "aten")
LENGTHS_B = torch.tensor([24, 16])
TIES = (False, True)


EVERY_LAYOUT = LAYOUTS | {"2 stages": PIPELINE_LAYOUTS["2 stages"]}


def token_ids(seed: int) -> torch.Tensor:
    return torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(seed))


def noisy_ids(clean_BT: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    is_masked = torch.rand(clean_BT.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    return clean_BT.masked_fill(is_masked, mask_token_id)


@torch.no_grad()
def teacher_logits(folder: Path, parallel) -> torch.Tensor:
    with layout(parallel) as groups:
        model = load_teacher(tiny_config(folder, parallel=parallel), groups)
        return gathered_logits(model, model(token_ids(1), torch.arange(24), None))


@torch.no_grad()
def student_logits(folder: Path, parallel, backend: str, block_size: int) -> torch.Tensor:
    """Clean rows, then noisy ones."""
    rollout = RolloutConfig(block_size=block_size)
    with layout(parallel) as groups:
        model, special = load_student(tiny_config(folder, parallel=parallel, backend=backend, rollout=rollout), groups)
        clean_BT = token_ids(1)
        streams = torch.cat([clean_BT, noisy_ids(clean_BT, special.mask_token_id)])
        return gathered_logits(model, model(streams, torch.arange(24), LENGTHS_B))


def every_case(rank: int, folders: dict[bool, Path], layouts: list[str]) -> dict[tuple, torch.Tensor]:
    results = {}
    for name in layouts:
        for tie, folder in folders.items():
            results[name, tie, "teacher"] = teacher_logits(folder, EVERY_LAYOUT[name])
            for backend in BACKENDS:
                for block_size in BLOCK_SIZES:
                    results[name, tie, backend, block_size] = student_logits(
                        folder, EVERY_LAYOUT[name], backend, block_size
                    )
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, Path]:
    return {tie: make_tiny_qwen3(tmp_path_factory.mktemp("hf"), tie=tie, seed=int(tie)) for tie in TIES}


@pytest.fixture(scope="module")
def results(folders, world_of_one) -> dict[tuple, torch.Tensor]:
    one_layout, *two_layouts = EVERY_LAYOUT
    first, second = run_on_ranks(every_case, 2, folders, two_layouts)
    assert all(torch.equal(first[case], second[case]) for case in first), "all ranks of a model must agree"
    return every_case(0, folders, [one_layout]) | first


@pytest.mark.parametrize("tie", TIES, ids=["untied", "tied"])
@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_teacher_logits_equal_those_of_transformers(folders, results, name, tie):
    with torch.no_grad():
        expected = load_reference(folders[tie])(input_ids=token_ids(1)).logits
    actual = results[name, tie, "teacher"][..., : expected.shape[-1]]
    assert (actual - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tie", TIES, ids=["untied", "tied"])
@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_student_logits_of_both_streams_equal_one_masked_sequence_of_transformers(
    folders, results, name, tie, backend, block_size
):
    clean_BT = token_ids(1)
    model = load_reference(folders[tie])
    noisy_BT = noisy_ids(clean_BT, model.config.vocab_size - 3)
    with torch.no_grad():
        expected = torch.cat(two_stream_logits(model, clean_BT, noisy_BT, LENGTHS_B, block_size))
    is_real = (torch.arange(24) < LENGTHS_B[:, None]).repeat(2, 1)
    actual = results[name, tie, backend, block_size][..., : expected.shape[-1]]
    assert (actual - expected)[is_real].abs().max() <= TOLERANCE


def test_rows_that_pad_the_vocabulary_have_zero_logits(results, folders):
    for case, logits in results.items():
        num_rows = load_reference(folders[case[1]]).config.vocab_size
        assert logits.shape[-1] % 128 == 0 and not logits[..., num_rows:].any()
