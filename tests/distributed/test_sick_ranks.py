"""A rank that sleeps for ever in a phase: the run ends within the limit, and says which rank, and in which phase."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from torch.multiprocessing import ProcessExitedException

from megatron_opdlm.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ParallelConfig,
    RolloutConfig,
    TrainingConfig,
)
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, no_report, tiny_config

LIMIT_SECONDS = 8.0
SICK_RANK = 1
PLACES = {
    "rollout": "megatron_opdlm.rollout.generation.Generation._take_requests",
    "teacher": "megatron_opdlm.objectives.on_policy_distillation.teacher_hidden_states",
    "student": "megatron_opdlm.training.train_step.zero_gradients",
    "checkpoint": "megatron_opdlm.training.trainer.save_train_state",
}
"""Phase -> a function in it, where one rank falls asleep."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sick ranks")
    make_tiny_qwen3(root / "model", seed=1)
    write_prompts(root / "prompts.jsonl", 8)
    return root


def sleep_for_ever(*arguments, **settings) -> None:
    Path(os.environ["FELL_ASLEEP"]).touch()
    while True:
        time.sleep(60)


def train_and_sleep(rank: int, root: Path, phase: str) -> None:
    from megatron_opdlm.training.trainer import Trainer

    os.environ["FELL_ASLEEP"] = str(root / f"{phase} asleep")
    sys.stderr = (root / f"{phase} rank {rank}").open("w")
    config = tiny_config(
        root / "model",
        parallel=ParallelConfig(distributed_timeout_minutes=LIMIT_SECONDS / 60),
        rollout=RolloutConfig(max_new_tokens=4),
        data=DataConfig(train_files=[str(root / "prompts.jsonl")]),
        training=TrainingConfig(max_steps=2, num_prompts_per_step=4, global_batch_size=2, pad_to_multiple=8),
        checkpoint=CheckpointConfig(save_interval=1),
        logging=LoggingConfig(directory=str(root / phase), tensorboard=False, progress_bar=False),
    )
    with layout(config.parallel), no_report():
        trainer = Trainer(config)
        if rank == SICK_RANK:
            mock.patch(PLACES[phase], sleep_for_ever).start()
        trainer.run()


@pytest.mark.parametrize("phase", PLACES)
def test_a_rank_that_sleeps_for_ever_ends_the_run_and_is_named(root, phase):
    with pytest.raises(ProcessExitedException) as stop:
        run_on_ranks(train_and_sleep, 2, root, phase)
    lasted = time.time() - (root / f"{phase} asleep").stat().st_mtime
    assert stop.value.exit_code == 3
    assert lasted < LIMIT_SECONDS + 2, f"{lasted} s"
    told = "".join((root / f"{phase} rank {rank}").read_text() for rank in range(2))
    assert len(re.findall("no progress for", told)) == 1, told
    assert "(parallel.distributed_timeout_minutes is 0.133333)" in told
    assert re.search(rf"did not arrive: rank {SICK_RANK}, in phase {phase} at .* sleep_for_ever", told), told
    assert re.search(r"waiting: rank 0, in phase \w+ at ", told), told
