"""Score a model on tasks with known answers.

    torchrun --nproc-per-node 8 -m megatron_opdlm.evaluate --config recipe.yaml --student.hf student \\
        --evaluation.tasks opdlm_gsm8k,opdlm_math500 --evaluation.output scores
    torchrun --nproc-per-node 2 -m megatron_opdlm.evaluate --config recipe.yaml --rollout.temperature 0 \\
        --student.checkpoint runs/mine/checkpoints --evaluation.files heldout.jsonl --evaluation.output scores.json

`evaluation.tasks` are those of lm-evaluation-harness (`evaluation/README.md`), `evaluation.files` reasoning-gym's. The
decoding settings are those of the `rollout` section, for tasks also what they ask for; they stand beside the scores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_opdlm.config.errors import user_errors
from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import Config


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
    evaluation.decode()
    shut_down()  # scoring can take longer than ranks wait for each other
    results = evaluation.results() if is_first else None
    if results is not None:
        write_results(results, output_folder(config))
        print(results_table(results))


def _evaluate_files(config: Config) -> None:
    # torch and Megatron are imported only when there is something to evaluate, so `--help` answers at once
    from megatron_opdlm.config.check import check_layout
    from megatron_opdlm.evaluation.task_files import score_task_files
    from megatron_opdlm.observability.logging import set_up_logging
    from megatron_opdlm.parallel.initialize import rank, shut_down, world_size

    check_layout(config.parallel, world_size())
    output = Path(config.evaluation.output) if config.evaluation.output else None
    if output and not output.parent.is_dir():
        raise ValueError(f"evaluation.output ({output}) must lie in a folder that exists")
    set_up_logging()
    results = score_task_files(config)
    if rank() == 0:
        for file, result in results.items():
            print(f"{file}: " + ", ".join(f"{name} {value:.4g}" for name, value in result["scores"].items()))
        if output:
            output.write_text(json.dumps(results, indent=1) + "\n")
    shut_down()


if __name__ == "__main__":
    main(sys.argv[1:])
