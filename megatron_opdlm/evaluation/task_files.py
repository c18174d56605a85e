"""From task files to scores: reads the tasks, builds the student, decodes, scores.

results = score_task_files(config)
results["heldout.jsonl"]["scores"]["accuracy"]
"""

from __future__ import annotations

import dataclasses
import logging

from megatron_opdlm.checkpointing.student_and_teacher import build_student, open_student, padded_vocab_size
from megatron_opdlm.config.schema import Config
from megatron_opdlm.data.prompts import Prompt, read_prompts
from megatron_opdlm.evaluation.scoring import evaluate_student
from megatron_opdlm.evaluation.verifiable_tasks import load_verifier, read_tasks
from megatron_opdlm.parallel.initialize import initialize
from megatron_opdlm.rollout.engine import RolloutEngine

logger = logging.getLogger(__name__)


def score_task_files(config: Config) -> dict[str, dict]:
    """For each of `evaluation.files` the `scores`, the `rollout` settings they hold for, and the `responses`.

    All ranks must call it and get the same. ValueError for a file or a model that does not fit, before any decoding.
    """
    source = open_student(config.student, config.rollout.stop_token_ids)
    work = {file: _read(file, config, source.tokenizer) for file in config.evaluation.files}
    groups = initialize(config.parallel, config.training.seed)
    model = build_student(source, _without_fp8(config), groups, padded_vocab_size(config, source.architecture))
    engine = RolloutEngine(model, config.rollout, source.special, config.training.seed, groups)
    results = {}
    for file, (tasks, prompts) in work.items():
        scores, responses = evaluate_student(
            engine, tasks, prompts, source.tokenizer, max_new_tokens=config.rollout.max_new_tokens, group=groups.dp
        )
        results[file] = {"scores": scores, "rollout": dataclasses.asdict(config.rollout), "responses": responses}
    return results


def _without_fp8(config: Config) -> Config:
    """FP8 is for training: decoding runs in `precision.dtype`, also on a machine that has no FP8."""
    return dataclasses.replace(
        config,
        precision=dataclasses.replace(config.precision, fp8="off"),
        attention=dataclasses.replace(config.attention, fp8=False),
    )


def _read(file: str, config: Config, tokenizer) -> tuple[list[dict], list[Prompt]]:
    """The tasks of a file, at most `evaluation.max_tasks`, and their prompts."""
    tasks = read_tasks(file)
    for source in {task["source"] for task in tasks}:
        load_verifier(source)
    prompt_set = read_prompts(
        [file],
        tokenizer,
        max_prompt_tokens=config.data.max_prompt_tokens,
        apply_chat_template=config.data.apply_chat_template,
        enable_thinking=config.data.enable_thinking,
    )
    if prompt_set.num_too_long:
        logger.warning("%s: %d tasks over data.max_prompt_tokens are left out", file, prompt_set.num_too_long)
    prompts = prompt_set.prompts[: config.evaluation.max_tasks]
    return [tasks[prompt.prompt_id] for prompt in prompts], prompts
