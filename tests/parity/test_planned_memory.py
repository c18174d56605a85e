"""The planner's bytes against those of real models that take a real training step in this process."""

from __future__ import annotations

import pytest

from megatron_opdlm.config.schema import ParallelConfig
from tests.planned_steps import measure_step, planned_config
from tests.tiny_moe import make_tiny_moe
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout

CASES = {
    "float32": (make_tiny_qwen3, {}),
    "tied": (make_tiny_qwen3, {"tie": True}),
    "bfloat16": (make_tiny_qwen3, {"dtype": "bfloat16"}),
    "full recompute": (make_tiny_qwen3, {"recompute": "full"}),
    "selective recompute": (make_tiny_qwen3, {"recompute": "selective", "rows": 1}),
    "experts": (make_tiny_moe, {}),
    "experts, full recompute": (make_tiny_moe, {"recompute": "full"}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_lasts_is_exact_and_the_peak_of_a_step_within_a_tenth(name, tmp_path, world_of_one):
    make, settings = CASES[name]
    shape = {"tie": settings["tie"]} if "tie" in settings else {}
    settings = {key: value for key, value in settings.items() if key != "tie"}
    config = planned_config(make(tmp_path / "model", num_layers=3, **shape), ParallelConfig(), **settings)
    with layout(config.parallel) as groups:
        line = measure_step(config, groups)
    planned, measured = line["planned"], line["measured"]
    for part in ("weights", "gradients", "optimizer", "teacher"):
        assert planned[part] == measured[part], part
    assert planned["peak"] == pytest.approx(measured["peak"], rel=0.1)
