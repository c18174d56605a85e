"""Score a model on tasks with known answers.

    torchrun --nproc-per-node 8 -m megatron_opdlm.evaluate --config recipe.yaml --student.hf student \\
        --evaluation.tasks opdlm_gsm8k,opdlm_math500 --evaluation.output scores
    torchrun --nproc-per-node 2 -m megatron_opdlm.evaluate --config recipe.yaml --rollout.temperature 0 \\
        --student.checkpoint runs/mine/checkpoints --evaluation.files heldout.jsonl --evaluation.output scores.json

`evaluation.tasks` are those of lm-evaluation-harness (`evaluation/README.md`), `evaluation.files` reasoning-gym's. The
decoding settings are those of the `rollout` section, for tasks also what they ask for; they stand beside the scores.
With several of them,

    ... --evaluation.sweep.thresholds "[0.7,0.8,0.9]" --evaluation.sweep.block_sizes "[4,8]" --evaluation.output sweep

decodes the tasks once for each pair and leaves a table and a plot in the folder `sweep`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opdlm.config.errors import user_errors
from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import Config

if TYPE_CHECKING:
    from megatron_opdlm.evaluation.sweep import Score


def main(arguments: list[str] | None = None) -> None:
    """Parses, checks, decodes, scores. A user's mistake ends in one line and exit code 2."""
    with user_errors():
        config = load_config(arguments, required=("evaluation",), description=__doc__.splitlines()[0])
        if config.evaluation.tasks:
            _evaluate_tasks(config)
        else:
            _evaluate_files(config)


def _evaluate_tasks(config: Config) -> None:
    from megatron_opdlm.config.check import check_layout
    from megatron_opdlm.evaluation.lm_eval_tasks import require_lm_eval
    from megatron_opdlm.observability.logging import set_up_logging
    from megatron_opdlm.parallel.initialize import rank, shut_down, world_size

    check_layout(config.parallel, world_size())
    require_lm_eval()
    from megatron_opdlm.evaluation.harness import TaskEvaluation, output_folder
    from megatron_opdlm.evaluation.results import results_table, write_results

    set_up_logging()
    evaluation, is_first = TaskEvaluation(config), rank() == 0
    if config.evaluation.sweep.is_wanted:
        _run_sweep(config, evaluation.score, evaluation.subject(), output_folder(config))
        shut_down()
        return
    evaluation.decode()
    shut_down()  # scoring can take longer than ranks wait for each other
    results = evaluation.results() if is_first else None
    if results is not None:
        write_results(results, output_folder(config))
        print(results_table(results))


def _evaluate_files(config: Config) -> None:
    # torch and Megatron are imported only when there is something to evaluate, so `--help` answers at once
    from megatron_opdlm.config.check import check_layout
    from megatron_opdlm.observability.logging import set_up_logging
    from megatron_opdlm.parallel.initialize import shut_down, world_size

    check_layout(config.parallel, world_size())
    output = Path(config.evaluation.output) if config.evaluation.output else None
    if output and not output.parent.is_dir():
        raise ValueError(f"evaluation.output ({output}) must lie in a folder that exists")
    if config.evaluation.sweep.is_wanted:
        _check_folder_of_sweep(output)
    set_up_logging()
    if config.evaluation.sweep.is_wanted:
        _sweep(config, output)
    else:
        _score(config, output)
    shut_down()


def _check_folder_of_sweep(output: Path | None) -> None:
    if output is None:
        raise ValueError("evaluation.sweep needs evaluation.output, a folder for its table and plot")
    if output.exists() and not output.is_dir():
        raise ValueError(f"evaluation.output ({output}) must be a folder under evaluation.sweep, and is a file")


def _sweep(config: Config, folder: Path) -> None:
    from megatron_opdlm.evaluation.task_files import StudentOnTaskFiles

    student = StudentOnTaskFiles(config)
    _run_sweep(config, student.scores_and_costs, student.subject(), folder)


def _run_sweep(config: Config, score: Score, subject: dict, folder: Path) -> None:
    from megatron_opdlm.evaluation.sweep import Sweep, swept_rollouts
    from megatron_opdlm.parallel.initialize import rank

    rollouts = swept_rollouts(config.evaluation.sweep, config.rollout)
    Sweep(score, rollouts, folder, subject, config.logging.progress_bar).run()
    if rank() == 0:
        print((folder / "sweep.md").read_text(encoding="utf-8"))


def _score(config: Config, output: Path | None) -> None:
    from megatron_opdlm.evaluation.task_files import score_task_files
    from megatron_opdlm.parallel.initialize import rank

    results = score_task_files(config)
    if rank() == 0:
        for file, result in results.items():
            print(f"{file}: " + ", ".join(f"{name} {value:.4g}" for name, value in result["scores"].items()))
        if output:
            output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
