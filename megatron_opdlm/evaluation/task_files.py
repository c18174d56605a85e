"""From task files to scores: reads the tasks, builds the student, decodes, scores.

results = score_task_files(config)
results["heldout.jsonl"]["scores"]["accuracy"]

A student that is built once can decode in several ways:

student = StudentOnTaskFiles(config)
student.score(dataclasses.replace(config.rollout, dynamic_threshold=0.7))
"""

from __future__ import annotations

import dataclasses
import json
import logging

from megatron_opdlm.config.schema import Config, DataConfig, RolloutConfig
from megatron_opdlm.data.prompts import Prompt, read_prompts
from megatron_opdlm.evaluation.evaluated_model import open_evaluated_model
from megatron_opdlm.evaluation.fingerprint import folder_fingerprint, text_fingerprint
from megatron_opdlm.evaluation.scoring import costs, evaluate_student
from megatron_opdlm.evaluation.verifiable_tasks import load_verifier, read_tasks
from megatron_opdlm.parallel.initialize import initialize

logger = logging.getLogger(__name__)


def score_task_files(config: Config) -> dict[str, dict]:
    """`StudentOnTaskFiles.score` with the settings of `rollout`. All ranks must call it and get the same."""
    return StudentOnTaskFiles(config).score(config.rollout)


class StudentOnTaskFiles:
    """The tasks of `evaluation.files`, and the student that responds to them.

    All ranks must make one. ValueError for a file or a model that does not fit, before any decoding.
    """

    def __init__(self, config: Config, show_progress: bool = False) -> None:
        self.opened = open_evaluated_model(config)
        self.work = {
            file: read_task_file(file, config.data, config.evaluation.max_tasks, self.opened.tokenizer)
            for file in config.evaluation.files
        }
        self.groups = initialize(config.parallel, config.training.seed)
        self.model, self.show_progress = self.opened.load(self.groups), show_progress

    def score(self, rollout: RolloutConfig) -> dict[str, dict]:
        """For each file the `scores`, the `rollout` settings they hold for, the `costs` and the `responses`.

        `rollout` may have any block size. All ranks must call it and get the same, but for what took time.
        """
        engine = self.model.engine(rollout, show_progress=self.show_progress)
        results = {}
        for file, (tasks, prompts) in self.work.items():
            scores, responses = evaluate_student(
                engine,
                tasks,
                prompts,
                self.opened.tokenizer,
                max_new_tokens=rollout.max_new_tokens,
                group=self.groups.dp,
            )
            results[file] = {
                "scores": scores,
                "costs": costs(engine.statistics, self.groups.dp_cp),
                "rollout": dataclasses.asdict(rollout),
                "responses": responses,
            }
        return results

    def scores_and_costs(self, rollout: RolloutConfig) -> dict[str, dict[str, float]]:
        """What a sweep shows of `score`, for each file. All ranks must call it."""
        return {file: result["scores"] | result["costs"] for file, result in self.score(rollout).items()}

    def subject(self) -> dict:
        """Who is scored, and on what, so that scores of something else are not mistaken for these."""
        tasks = {
            file: f"{len(rows)} ({text_fingerprint(json.dumps([rows, [prompt.token_ids for prompt in prompts]]))})"
            for file, (rows, prompts) in self.work.items()
        }
        return {
            "student": f"{self.opened.folder} ({folder_fingerprint(self.opened.pretrained.folder)})",
            "mask_token_id": self.opened.special.mask_token_id,
            "dtype": self.opened.config.precision.dtype,
            "seed": self.opened.config.training.seed,
            "tasks": tasks,
        }


def read_task_file(file: str, data: DataConfig, max_tasks: int | None, tokenizer) -> tuple[list[dict], list[Prompt]]:
    """The first `max_tasks` tasks of a file, None for all, and their prompts. ValueError names what is wrong in it."""
    tasks = read_tasks(file)
    for source in {task["source"] for task in tasks}:
        load_verifier(source)
    prompt_set = read_prompts(
        [file],
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        apply_chat_template=data.apply_chat_template,
        enable_thinking=data.enable_thinking,
    )
    if prompt_set.num_too_long:
        logger.warning("%s: %d tasks over data.max_prompt_tokens are left out", file, prompt_set.num_too_long)
    prompts = prompt_set.prompts[:max_tasks]
    return [tasks[prompt.prompt_id] for prompt in prompts], prompts
