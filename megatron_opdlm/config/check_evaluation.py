"""Rules of the `evaluation` section; part of `config.check`, where the rules that concern several sections are.

check_evaluation(config.evaluation, config.rollout)

Each violation is a ValueError that names the setting, its value and the rule.
"""

from __future__ import annotations

from megatron_opdlm.config.rules import at_least, require, within
from megatron_opdlm.config.schema import EvaluationConfig, RolloutConfig, SweepConfig


def check_evaluation(evaluation: EvaluationConfig, rollout: RolloutConfig) -> None:
    """What holds whether or not anything is evaluated. ValueError says what does not."""
    at_least(
        1,
        "evaluation",
        max_tasks=evaluation.max_tasks,
        num_responses=evaluation.num_responses,
        max_new_tokens=evaluation.max_new_tokens,
        num_chunks=evaluation.num_chunks,
        code_processes=evaluation.code_processes,
    )
    at_least(0, "evaluation", temperature=evaluation.temperature, interval=evaluation.interval)
    require(
        0 <= evaluation.chunk < evaluation.num_chunks,
        f"evaluation.chunk ({evaluation.chunk}) must be from 0 to one below evaluation.num_chunks "
        f"({evaluation.num_chunks})",
    )
    require(
        not (evaluation.files and evaluation.tasks),
        f"evaluation.files ({', '.join(evaluation.files)}) and evaluation.tasks ({', '.join(evaluation.tasks)}) "
        "exclude each other: give one",
    )
    require(
        not (evaluation.files and evaluation.role == "teacher"),
        "evaluation.role (teacher) must be student for evaluation.files; evaluation.tasks takes either",
    )
    for name, value, only in (("role", evaluation.role, "student"), ("num_chunks", evaluation.num_chunks, 1)):
        require(
            value == only or not evaluation.sweep.is_wanted,
            f"evaluation.{name} ({value}) must be {only} under evaluation.sweep",
        )
    _check_sweep(evaluation.sweep, rollout)


def _check_sweep(sweep: SweepConfig, rollout: RolloutConfig) -> None:
    """Each point must be a rollout that could have been asked for by itself."""
    for name, values in (("thresholds", sweep.thresholds), ("block_sizes", sweep.block_sizes)):
        for value in values:
            require(values.count(value) == 1, f"evaluation.sweep.{name} ({values}) must have {value} only once")
    for threshold in sweep.thresholds:
        within(0, 1, "evaluation.sweep", thresholds=threshold)
    for block_size in sweep.block_sizes:
        at_least(1, "evaluation.sweep", block_sizes=block_size)
        require(
            rollout.max_tokens_in_flight >= 2 * block_size,
            f"rollout.max_tokens_in_flight ({rollout.max_tokens_in_flight}) must be at least two blocks of "
            f"evaluation.sweep.block_sizes ({block_size})",
        )
