"""Every shipped recipe is one that a run would take, and its plan fits the GPUs that it names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_opdlm.config.load import load_config
from megatron_opdlm.observability.hardware import GPUS
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.memory import GIB
from megatron_opdlm.planning.prediction import memory_budget, plan_stages, predict
from megatron_opdlm.planning.rates import Rates
from megatron_opdlm.planning.scaling import GPUS_OF_8B, prediction_of
from megatron_opdlm.planning.search import check_choice
from megatron_opdlm.planning.workload import Workload
from tools.plan import models_of

EXAMPLES = Path(__file__).parents[3] / "examples"
LAUNCH = EXAMPLES.parent / "launch"
HARDWARE = {
    "qwen3_0.6b": [("recipe.yaml", 8)],
    "qwen3_1.7b": [("recipe.yaml", 8)],
    "qwen3_4b": [("recipe.yaml", 8)],
    "qwen3_8b": [("recipe.yaml", 8), ("64_gpus.yaml", 64), ("512_gpus.yaml", 512)],
    "qwen3_14b": [("recipe.yaml", 8)],
    "qwen3_32b": [("recipe.yaml", 16)],
    "qwen3_30b_a3b": [("recipe.yaml", 16)],
    "qwen3_235b_a22b": [("recipe.yaml", 128)],
    "math": [("recipe.yaml", 8), ("4b.yaml", 8)],
    "math_thinking": [("recipe.yaml", 8), ("4b.yaml", 8)],
}
"""Folder -> its files, each laid over `recipe.yaml`, and the H100s that they are for."""
CASES = [(folder, file, num_gpus) for folder, files in HARDWARE.items() for file, num_gpus in files]


def recipe(folder: str, file: str):
    layers = dict.fromkeys(("recipe.yaml", file))
    return load_config([f"--config={EXAMPLES / folder / name}" for name in layers])


@pytest.mark.parametrize(("folder", "file", "num_gpus"), CASES)
def test_a_recipe_is_allowed_and_fits_its_hardware(folder, file, num_gpus):
    config = recipe(folder, file)
    models, gpu = models_of(config, None, None), GPUS["h100-80gb"]
    check_choice(models, config, num_gpus)
    layout, workload = Layout.of(config.parallel, num_gpus), Workload.of(config)
    stages, budget = plan_stages(models, config, layout, workload), memory_budget(gpu, Rates())
    assert max(plan.peak for plan in stages) < budget
    # and the cache holds a good part of the sequences that a rank decodes at one time
    assert min(plan.cache_bytes(budget) / plan.cache_wanted for plan in stages) > 0.25


@pytest.mark.parametrize(("folder", "file", "num_gpus"), CASES)
def test_a_recipe_says_what_hardware_it_is_for(folder, file, num_gpus):
    head = (EXAMPLES / folder / file).read_text().split("\n\n")[0]
    if file != "4b.yaml":
        assert re.search(rf"Hardware: {num_gpus} x H100 80GB", head)


@pytest.mark.parametrize("folder", HARDWARE)
def test_a_recipe_has_its_command_and_its_page(folder):
    assert f'launch/recipe.sh" examples/{folder} ' in (EXAMPLES / folder / "run.sh").read_text()
    assert "tools/plan.py" in (EXAMPLES / folder / "README.md").read_text()


@pytest.mark.parametrize("folder", HARDWARE)
def test_a_command_hands_recipe_prompts_and_settings_to_the_launcher(folder, tmp_path):
    (tmp_path / "examples" / folder).mkdir(parents=True)
    (tmp_path / "launch").mkdir()
    (tmp_path / "prompts").mkdir()
    command = shutil.copy(EXAMPLES / folder / "run.sh", tmp_path / "examples" / folder)
    shutil.copy(LAUNCH / "recipe.sh", tmp_path / "launch")
    (tmp_path / "launch" / "torchrun.sh").write_text('echo "$@"')

    def run(*settings: str, **environment: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PROMPTS": "prompts"} | environment
        return subprocess.run(["bash", command, *settings], env=environment, capture_output=True, text=True)

    refused = run()
    assert refused.returncode == 2 and refused.stderr.startswith("error: PROMPTS (prompts) must be a folder with")
    (tmp_path / "prompts" / "part.parquet").touch()
    train, recipe_of = "-- -m megatron_opdlm.train", f"--config examples/{folder}/"
    files = "--data.train_files prompts/part.parquet"
    assert run("--rollout.block_size", "8").stdout.split("\n")[0] == (
        f"{train} {recipe_of}recipe.yaml {files} --rollout.block_size 8"
    )
    layered = run(DRY_RUN="1", LAYERS="4b.yaml").stdout.strip()
    assert layered == f"--dry-run {train} {recipe_of}recipe.yaml {recipe_of}4b.yaml {files}"


@pytest.mark.parametrize("folder", HARDWARE)
def test_a_page_quotes_what_the_planner_predicts(folder):
    config, gpu = recipe(folder, "recipe.yaml"), GPUS["h100-80gb"]
    layout = Layout.of(config.parallel, HARDWARE[folder][0][1])
    made = predict(models_of(config, None, None), config, layout, gpu, Workload.of(config), Rates())
    rollout = made.phases["rollout"].seconds
    memory = f"{made.peak / GIB:.0f} of {made.budget / GIB:.0f} GiB"
    page, comments = ((EXAMPLES / folder / name).read_text() for name in ("README.md", "recipe.yaml"))
    assert f" | {memory} | {made.seconds:.1f} s | {rollout:.1f} s | {100 * made.mfu:.1f} % |" in page
    assert memory in comments


@pytest.mark.parametrize("place", range(4))
def test_the_front_page_quotes_what_the_planner_predicts(place):
    num_gpus, scale = GPUS_OF_8B[place]
    made, _ = prediction_of("qwen3-8b", num_gpus, scale)
    rollout = made.phases["rollout"].seconds
    row = f" | {made.layout.spelt()} | {made.seconds:.1f} s | {rollout:.1f} s | {made.peak / GIB:.0f} GiB |"
    lines = (EXAMPLES.parent / "README.md").read_text().split("\n")
    assert sum(line.startswith(f"| {num_gpus} | {scale.prompts:,}, ") and line.endswith(row) for line in lines) == 1


def test_no_recipe_is_left_out():
    with_recipes = {path.parent.name for path in EXAMPLES.glob("*/recipe.yaml")} - {"quickstart"}
    assert with_recipes == set(HARDWARE)


TABLE = {
    "qwen3_0.6b": (0, None, 4000, 100, 482),
    "qwen3_1.7b": (0, None, 4000, 100, 482),
    "qwen3_4b": (16, None, 4000, 100, 482),
    "qwen3_8b": (16, None, 4000, 100, 482),
    "math": (0, False, 2000, 100, 625),
    "math_thinking": (0, True, 8000, 200, 625),
}
"""The paper's rows: divergence.top_k, enable_thinking, longest response, ramp, steps of the epochs."""


@pytest.mark.parametrize("folder", TABLE)
def test_the_papers_rows_have_its_hyperparameters(folder):
    config, (top_k, thinking, longest, ramp, steps) = recipe(folder, "recipe.yaml"), TABLE[folder]
    assert (config.divergence.kind, config.divergence.top_k, config.divergence.top_k_tail) == (
        "forward_kl",
        top_k,
        "none",
    )
    assert (config.curricula.length_start, config.curricula.length_ramp_steps) == (100, ramp)
    assert config.curricula.length_shape == "cosine"  # `type` of max_token_schedule in divelab/OPDLM's rl_bd3lm.yaml
    assert (config.rollout.max_new_tokens, config.training.max_steps) == (longest, steps)
    assert config.data.enable_thinking == bool(thinking)
    rollout, training, optimizer = config.rollout, config.training, config.optimizer
    assert (rollout.block_size, rollout.denoising_steps_per_block, rollout.dynamic_threshold) == (4, 4, 0.9)
    assert (rollout.remasking_strategy, rollout.temperature) == ("low_confidence_dynamic", 1.0)
    assert (training.num_prompts_per_step, training.global_batch_size) == (128, 8)
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_warmup_steps, optimizer.clip_grad) == (1e-5, 1e-6, 5, 1.0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps, optimizer.weight_decay) == (
        0.9,
        0.999,
        1e-8,
        0.0,
    )
    assert config.precision.dtype == "bfloat16"
    caps = {"math": 4096, "code": 2048, "chat": 2048, "science": 1024}
    assert rollout.max_new_tokens_by_domain == (caps if folder.startswith("qwen3") else {})
