"""Every layout keeps the same rollouts with the same figures: the teacher's word is gathered from all its shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opdlm.config.schema import DataConfig, DivergenceConfig, LoggingConfig, RolloutConfig, TrainingConfig
from megatron_opdlm.observability.trajectories import KeptTrajectory, read_trajectories
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import CONTEXT_LAYOUTS, LAYOUTS, PIPELINE_LAYOUTS, layout, run_trainer, tiny_config

REFERENCE = "tensor parallel 1"
LAYOUT_OF = LAYOUTS | PIPELINE_LAYOUTS | CONTEXT_LAYOUTS
OTHERS = ["tensor parallel 2", "sequence parallel 2", "2 stages", "2 stages of 2 chunks", "context parallel 2"]


def keep(rank: int, names: list[str], root: Path) -> None:
    for name in names:
        config = tiny_config(
            root / "student",
            teacher=root / "teacher",
            parallel=LAYOUT_OF[name],
            backend="aten",
            rollout=RolloutConfig(max_new_tokens=8, dynamic_threshold=0.12, stop_token_ids=[5]),
            divergence=DivergenceConfig(chunk_size=5),
            data=DataConfig(train_files=[str(root / "prompts.jsonl")]),
            training=TrainingConfig(
                max_steps=1, num_prompts_per_step=4, global_batch_size=4, micro_batch_size=2, pad_to_multiple=8
            ),
            logging=LoggingConfig(directory=str(root / name), tensorboard=False, progress_bar=False),
        )
        with layout(LAYOUT_OF[name]):
            run_trainer(config)


@pytest.fixture(scope="module")
def kept(tmp_path_factory, world_of_one) -> dict[str, list[KeptTrajectory]]:
    root = tmp_path_factory.mktemp("layouts")
    make_tiny_qwen3(root / "student", seed=1, num_layers=4)
    make_tiny_qwen3(root / "teacher", seed=3, num_layers=8)
    write_prompts(root / "prompts.jsonl", 8)
    keep(0, [REFERENCE], root)
    run_on_ranks(keep, 2, OTHERS, root)
    return {name: read_trajectories(root / name / "trajectories.jsonl") for name in [REFERENCE, *OTHERS]}


@pytest.mark.parametrize("name", OTHERS)
def test_every_layout_keeps_the_same_rollouts_with_the_same_figures(kept, name):
    expected = {sequence.prompt_id: sequence for sequence in kept[REFERENCE]}
    assert len(expected) == len(kept[name]) == 2
    for sequence in kept[name]:
        other = expected[sequence.prompt_id]
        assert (sequence.token_ids, sequence.step_map, sequence.texts) == (other.token_ids, other.step_map, other.texts)
        for figures in ("log_probs", "divergence", "teacher_log_probs"):
            counted = getattr(other, figures)[: other.response_length]
            assert getattr(sequence, figures)[: other.response_length] == pytest.approx(counted, abs=2e-5), figures
        for mine, theirs in zip(sequence.alternatives, other.alternatives, strict=True):
            assert [token for token, _ in mine] == [token for token, _ in theirs]
            assert [value for _, value in mine] == pytest.approx([value for _, value in theirs], abs=2e-5)
