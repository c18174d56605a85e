"""Decoding tasks with known answers and scoring the responses.

scores, responses = evaluate_student(engine, tasks, prompts, tokenizer, max_new_tokens=64, group=groups.dp)
scores["accuracy"], scores["tokens_per_step"]
costs(engine.statistics, groups.dp_cp)["seconds"]
"""

from __future__ import annotations

import math

import torch.distributed as dist

from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.evaluation.verifiable_tasks import score_response
from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask
from megatron_opdlm.rollout.statistics import RolloutStatistics


def evaluate_student(
    engine: RolloutEngine,
    tasks: list[dict],
    prompts: list[Prompt],
    tokenizer,
    *,
    max_new_tokens: int,
    group: dist.ProcessGroup,
) -> tuple[dict[str, float], list[dict]]:
    """Scores over all tasks and one record per response, in the tasks' order; the same on every rank.

    Args:
        tasks: rows with `source` and `entry`, one per prompt.
        prompts: the tasks' tokenized questions.
        group: data-parallel group the tasks are spread over. All ranks must call it.
    """
    share = engine.share(list(range(len(prompts))))
    trajectories = engine.generate([RolloutTask(prompt, max_new_tokens) for prompt in prompts], step=0)
    local = {
        index: _record(tasks[index], trajectory, tokenizer)
        for index, trajectory in zip(share, trajectories, strict=True)
    }
    gathered: list[dict[int, dict]] = [None] * group.size()
    dist.all_gather_object(gathered, local, group=group)
    everywhere = {index: record for part in gathered for index, record in part.items()}
    records = [everywhere[index] for index in range(len(prompts))]
    return _scores(records), records


def costs(statistics: RolloutStatistics, group: dist.ProcessGroup) -> dict[str, float]:
    """What the latest rollout took: `forwards` of all data-parallel ranks' models, `seconds` until the last was done.

    `group` is the data- and context-parallel one. All ranks must call it and get the same.
    """
    everywhere: list[tuple[int, float]] = [None] * group.size()
    dist.all_gather_object(everywhere, (statistics.num_forwards, statistics.seconds), group=group)
    forwards, seconds = zip(*everywhere, strict=True)
    return {"forwards": sum(forwards), "seconds": max(seconds)}


def _record(task: dict, trajectory: Trajectory, tokenizer) -> dict:
    text = tokenizer.decode(trajectory.response_ids.tolist(), skip_special_tokens=True)
    return {
        "question": task["question"],
        "response": text,
        "ground_truth_answer": task.get("ground_truth_answer"),
        "score": score_response(task, text),
        "num_tokens": trajectory.response_length,
        "num_steps": trajectory.num_steps,
        "stop_reason": trajectory.stop_reason,
    }


def _scores(records: list[dict]) -> dict[str, float]:
    num_tokens = sum(record["num_tokens"] for record in records)
    accuracy = sum(record["score"] == 1.0 for record in records) / len(records)
    return {
        "num_tasks": len(records),
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(records)),
        "tokens_per_step": num_tokens / sum(record["num_steps"] for record in records),
        "response_length": num_tokens / len(records),
        "end_token_fraction": sum(record["stop_reason"] == "end_token" for record in records) / len(records),
    }
