"""Scoring the student while it trains, and which training step has scored best.

    validation = Validation(config, source, model, groups)
    if validation.is_due(50):
        metrics |= validation.evaluate(50)              # {"evaluation/accuracy": 0.87, ...}
    validation.best_step                                # 50: the earliest of those with the highest accuracy

It decodes greedily, so it draws no random number, and an engine of its own counts what it costs: training goes on as
if it had not been.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opdlm.checkpointing.folders import is_whole, point_to_best, step_folder
from megatron_opdlm.checkpointing.student_and_teacher import StudentSource
from megatron_opdlm.config.schema import Config
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.evaluation.fingerprint import text_fingerprint
from megatron_opdlm.evaluation.scoring import costs, evaluate_student
from megatron_opdlm.evaluation.task_files import read_task_file
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.rollout.engine import RolloutEngine

logger = logging.getLogger(__name__)


def best_step_of(history: list[tuple[int, float]]) -> int | None:
    """Of pairs of a step and its accuracy the step of the highest, the earliest of several; None for no pairs."""
    return min(history, key=lambda scored: (-scored[1], scored[0]))[0] if history else None


class Validation:
    """The tasks of `evaluation.files`, and how accurate the student was on them after which steps.

    All ranks must make one. Without `evaluation.interval` nothing is read and nothing is ever due.

    Raises:
        ValueError: a task file does not fit; the message names file, line and reason.
    """

    def __init__(
        self, config: Config, source: StudentSource, model: PipelineModel, groups: ProcessGroupCollection
    ) -> None:
        self.interval, self.last_step = config.evaluation.interval, config.training.max_steps
        self.max_new_tokens, self.groups, self.tokenizer = config.rollout.max_new_tokens, groups, source.tokenizer
        self.tasks: list[dict] = []
        self.prompts: list[Prompt] = []
        self.history: list[tuple[int, float]] = []
        """Training steps taken, and the accuracy then."""
        if self.interval:
            self._read_tasks(config)
            greedy = dataclasses.replace(config.rollout, temperature=0.0)
            self.engine = RolloutEngine(model, greedy, source.special, config.training.seed, groups)

    def is_due(self, step: int) -> bool:
        """Whether the student is to be scored after so many training steps."""
        return bool(self.interval) and (step % self.interval == 0 or step == self.last_step)

    def evaluate(self, step: int) -> dict[str, float]:
        """The scores after `step` training steps, as metrics. All ranks must call it and get the same accuracy."""
        scores, _ = evaluate_student(
            self.engine,
            self.tasks,
            self.prompts,
            self.tokenizer,
            max_new_tokens=self.max_new_tokens,
            group=self.groups.dp,
        )
        scores |= costs(self.engine.statistics, self.groups.dp_cp)
        self.history.append((step, scores["accuracy"]))
        best = "the best so far" if self.best_step == step else f"the best is that after {self.best_step}"
        logger.info("accuracy %.4f after %d training steps, %s", scores["accuracy"], step, best)
        return {f"evaluation/{name}": value for name, value in scores.items()}

    @property
    def best_step(self) -> int | None:
        """Training steps taken when the accuracy was highest, the fewest of several; None without an evaluation."""
        return best_step_of(self.history)

    def state_dict(self) -> dict:
        """What a run that goes on later must know."""
        return {"tasks": self._fingerprint(), "history": list(self.history)}

    def load_state_dict(self, state: dict, directory: Path) -> None:
        """Takes up the history of the run whose checkpoints are in `directory`. All ranks must call it.

        `best` there is made to name the best one again, as an interruption or a damaged checkpoint may have left it
        behind. The search begins anew if the tasks are others, or if that checkpoint is not whole any more.
        """
        self.history = [(step, accuracy) for step, accuracy in state["history"]]
        if self.tasks and state["tasks"] not in (None, self._fingerprint()):
            logger.warning("evaluation.files has other tasks than before: the best checkpoint is sought anew")
            self.history = []
        if self.best_step is None:
            return
        best = [dist.get_rank() == 0 and is_whole(step_folder(directory, self.best_step))]
        dist.broadcast_object_list(best, src=0)
        if not best[0]:
            logger.warning("%s was the best and is not whole: sought anew", step_folder(directory, self.best_step))
            self.history = []
        elif dist.get_rank() == 0:
            point_to_best(directory, self.best_step)

    def _read_tasks(self, config: Config) -> None:
        for file in config.evaluation.files:
            tasks, prompts = read_task_file(file, config.data, config.evaluation.max_tasks, self.tokenizer)
            self.tasks += tasks
            self.prompts += prompts

    def _fingerprint(self) -> str | None:
        prompts = [prompt.token_ids for prompt in self.prompts]
        return text_fingerprint(json.dumps([self.tasks, prompts])) if self.tasks else None
