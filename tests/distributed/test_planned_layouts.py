"""The planner's bytes of every rank's shard, against real shards that take a real training step on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_opdlm.config.schema import ParallelConfig
from tests.planned_steps import measure_step, planned_config
from tests.ranks import run_on_ranks
from tests.tiny_moe import make_tiny_moe
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout

LAYOUTS = {
    "data parallel": ("dense", ParallelConfig()),
    "tensor parallel": ("dense", ParallelConfig(tensor_model_parallel_size=2)),
    "sequence parallel": ("dense", ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "context parallel": ("dense", ParallelConfig(context_parallel_size=2)),
    "pipeline": ("tied", ParallelConfig(pipeline_model_parallel_size=2)),
    "interleaved": (
        "dense",
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "experts": ("experts", ParallelConfig(expert_model_parallel_size=2)),
    "shards of experts": ("experts", ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "whole experts": (
        "experts",
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
        ),
    ),
}


def measure_all(rank: int, folder: str) -> dict[str, dict]:
    lines = {}
    for name, (model, parallel) in LAYOUTS.items():
        config = planned_config(Path(folder, model), parallel)
        with layout(parallel) as groups:
            lines[name] = measure_step(config, groups)
            dist.barrier()
    return lines


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[dict[str, dict]]:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_qwen3(folder / "dense", num_layers=4)
    make_tiny_qwen3(folder / "tied", num_layers=4, tie=True)
    make_tiny_moe(folder / "experts", num_layers=4)
    return run_on_ranks(measure_all, 2, str(folder))


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_lasts_on_a_rank_is_exact(name, lines):
    for part in ("weights", "gradients", "teacher"):
        for rank, line in enumerate(lines):
            assert line[name]["planned"][part] == line[name]["measured"][part], (part, rank)
    # which rank updates how much of a padded buffer differs by its padding
    assert lines[0][name]["planned"]["optimizer"] == lines[0][name]["measured"]["optimizer"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_peak_of_a_step_is_within_an_eighth(name, lines):
    for line in lines:
        assert line[name]["planned"]["peak"] == pytest.approx(line[name]["measured"]["peak"], rel=0.125)
