"""Training steps on a GPU: Transformer Engine's layers, FP8 recipes, activation recompute, rollout in between.

A step in FP8 has to come close to the same step in bfloat16, from the same trajectories: rollout runs without FP8.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megatron_opdlm.config.schema import (
    AttentionConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainingConfig,
)
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, tiny_config

pytestmark = pytest.mark.gpu
NUM_STEPS = 3
"""Delayed scales start from one, so they need some steps to mean something."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    model = make_tiny_qwen3(root / "model", seed=1, hidden_size=256, head_dim=128)
    return model, write_prompts(root / "prompts.jsonl", 8)


@pytest.fixture
def world_of_one_gpu():
    """A process group of this process on its GPU."""
    from megatron_opdlm.parallel.initialize import initialize, shut_down

    initialize(ParallelConfig(), seed=0)
    yield
    shut_down()


def first_metrics(
    folders,
    root,
    *,
    precision: dict | None = None,
    attention: dict | None = None,
    transformer: dict | None = None,
    recompute: str = "none",
    fraction: float = 0.0,
    offload: bool = False,
) -> list[dict[str, float]]:
    """Metrics of the first steps of a run in bfloat16, or a skip where this machine refuses what it asks for."""
    from megatron_opdlm.training.trainer import Trainer

    model, prompts = folders
    config = tiny_config(
        model,
        transformer=transformer,
        optimizer=OptimizerConfig(cpu_offload_fraction=fraction),
        rollout=RolloutConfig(max_new_tokens=12, temperature=0.0),
        data=DataConfig(train_files=[str(prompts)]),
        training=TrainingConfig(num_prompts_per_step=4, global_batch_size=4, micro_batch_size=2, recompute=recompute),
        logging=LoggingConfig(directory=str(root)),
    )
    config = dataclasses.replace(
        config,
        teacher=dataclasses.replace(config.teacher, offload=offload),
        precision=PrecisionConfig(dtype="bfloat16", **(precision or {})),
        attention=AttentionConfig(**(attention or {})),
    )
    with layout(config.parallel):
        try:
            trainer = Trainer(config)
        except ValueError as error:
            pytest.skip(str(error))
        metrics = []
        for _ in range(NUM_STEPS):
            metrics.append(trainer._one_step())
            trainer.step += 1
    return metrics


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    ("precision", "attention"),
    [
        ({"fp8": "delayed"}, {}),
        ({"fp8": "tensorwise"}, {}),
        ({"fp8": "blockwise"}, {}),
        ({"teacher_fp8": "tensorwise"}, {}),
        ({"fp8": "delayed"}, {"fp8": True}),
    ],
    ids=str,
)
def test_steps_in_fp8_come_close_to_those_in_bfloat16(
    precision, attention, recompute, folders, world_of_one_gpu, tmp_path
):
    pytest.importorskip("transformer_engine", reason="FP8 needs Transformer Engine")
    exact = first_metrics(folders, tmp_path / "bf16", recompute=recompute)
    rough = first_metrics(folders, tmp_path / "fp8", precision=precision, attention=attention, recompute=recompute)
    assert exact[0]["train/loss"] > 0
    # Nothing has been learnt before the first step, so both decode the same.
    assert rough[0]["rollout/tokens_per_step"] == exact[0]["rollout/tokens_per_step"]
    assert rough[0]["train/loss"] == pytest.approx(exact[0]["train/loss"], rel=0.1)
    assert all(math.isfinite(step["train/loss"]) and math.isfinite(step["train/grad_norm"]) for step in rough)
    assert rough[-1]["train/loss"] == pytest.approx(exact[-1]["train/loss"], rel=0.25)


def test_local_and_transformer_engine_layers_take_the_same_step(folders, world_of_one_gpu, tmp_path):
    pytest.importorskip("transformer_engine", reason="the comparison needs Transformer Engine")
    runs = [
        first_metrics(folders, tmp_path / name, transformer={"transformer_impl": name})[0]
        for name in ("local", "transformer_engine")
    ]
    assert torch.cuda.is_available()
    assert runs[0]["train/loss"] == pytest.approx(runs[1]["train/loss"], rel=0.02)
    assert runs[0]["train/grad_norm"] == pytest.approx(runs[1]["train/grad_norm"], rel=0.05)


def test_a_teacher_in_host_memory_teaches_the_same(folders, world_of_one_gpu, tmp_path):
    plain = first_metrics(folders, tmp_path / "plain")
    hosted = first_metrics(folders, tmp_path / "hosted", offload=True)
    assert [step["train/loss"] for step in hosted] == pytest.approx([step["train/loss"] for step in plain], rel=1e-3)


def test_weights_in_host_memory_are_pinned_and_take_no_memory_of_the_gpu():
    from megatron_opdlm.parallel.host_memory import HostedWeights

    before = torch.cuda.memory_allocated()
    weight = torch.randn(1024, 1024, device="cuda")
    expected = weight.sum().item()
    hosted = HostedWeights([weight])
    assert torch.cuda.memory_allocated() == before and all(copy.is_pinned() for copy in hosted._copies)
    with hosted.on_device():
        assert weight.sum().item() == expected
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_an_optimizer_in_host_memory_takes_the_same_steps(fraction, folders, world_of_one_gpu, tmp_path):
    pytest.importorskip("transformer_engine", reason="it needs Transformer Engine")
    plain = first_metrics(folders, tmp_path / "plain")
    offloaded = first_metrics(folders, tmp_path / "offloaded", fraction=fraction)
    for name in ("train/loss", "train/grad_norm"):
        assert [step[name] for step in offloaded] == pytest.approx([step[name] for step in plain], rel=0.02)
