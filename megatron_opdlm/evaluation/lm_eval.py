"""The command line of lm-evaluation-harness, which knows the model `megatron_opdlm` here.

    torchrun --nproc-per-node 8 -m megatron_opdlm.evaluation.lm_eval run --model megatron_opdlm \\
        --model_args config=recipe.yaml,student.hf=student --tasks gsm8k --apply_chat_template --output_path scores

The harness takes no models of other packages by name, so its `lm_eval` command cannot find this one; here it is made
known first, and the tasks of `megatron_opdlm/evaluation/tasks` with it. All else is the harness's own, arguments and
output included. `--model_args` has the settings of a recipe by their dotted names, and `config`, a recipe.
"""

from __future__ import annotations

import sys

from megatron_opdlm.config.errors import user_errors
from megatron_opdlm.evaluation.benchmarks import TASKS_FOLDER
from megatron_opdlm.evaluation.lm_eval_tasks import require_lm_eval


def main(arguments: list[str] | None = None) -> None:
    """Runs the harness. A user's mistake ends in one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        require_lm_eval()
        from lm_eval.__main__ import cli_evaluate

        from megatron_opdlm.evaluation.lm_eval_model import MegatronOpdlm
        from megatron_opdlm.observability.logging import set_up_logging
        from megatron_opdlm.parallel.initialize import rank, shut_down

        set_up_logging()
        if rank() > 0:
            # They decode. Scoring, and whatever is written, is rank 0's alone.
            MegatronOpdlm.generate_until = _then_leave(MegatronOpdlm.generate_until)
        sys.argv = ["lm_eval", *with_our_tasks(arguments)]
        cli_evaluate()
        shut_down()


def with_our_tasks(arguments: list[str]) -> list[str]:
    """The arguments with our folder of tasks, unless they name another one."""
    names_folder = any(argument.partition("=")[0] == "--include_path" for argument in arguments)
    runs = "--tasks" in [argument.partition("=")[0] for argument in arguments]
    return [*arguments, "--include_path", str(TASKS_FOLDER)] if runs and not names_folder else arguments


def _then_leave(generate_until):
    """The harness asks a model once for all texts of a run; after that a rank that does not score has nothing to do."""

    def generate_and_leave(self, *arguments, **keywords):
        from megatron_opdlm.parallel.initialize import shut_down

        generate_until(self, *arguments, **keywords)
        shut_down()
        sys.exit(0)

    return generate_and_leave


if __name__ == "__main__":
    main()
