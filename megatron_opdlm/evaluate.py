"""Score a student on tasks with known answers.

    torchrun --nproc-per-node 2 -m megatron_opdlm.evaluate --config recipe.yaml --rollout.temperature 0 \\
        --student.checkpoint runs/mine/checkpoints --evaluation.files heldout.jsonl --evaluation.output scores.json

The decoding settings are those of the `rollout` section and are written beside the scores.
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
        config = load_config(arguments, required=("student", "evaluation.files"), description=__doc__.splitlines()[0])
        _evaluate(config)


def _evaluate(config: Config) -> None:
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
