"""Score a student on tasks with known answers.

    torchrun --nproc-per-node 2 -m megatron_opdlm.evaluate --config recipe.yaml --student.checkpoint runs/mine/checkpoints \\
        --evaluation.files heldout.jsonl --evaluation.output scores.json --rollout.temperature 0

The decoding settings are those of the `rollout` section and are written beside the scores.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from megatron_opdlm.config.errors import user_errors
from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import Config


def main(arguments: list[str] | None = None) -> None:
    """Parses, checks, decodes, scores. A user's mistake ends in one line and exit code 2."""
    with user_errors():
        config = load_config(
            arguments, required=("student", "evaluation.files"), description=__doc__.splitlines()[0]
        )
        _evaluate(config)


def _evaluate(config: Config) -> None:
    # torch and Megatron are imported only when there is something to evaluate, so `--help` answers at once
    from megatron_opdlm.checkpointing.student_and_teacher import build_student, open_student, padded_vocab_size
    from megatron_opdlm.config.check import check_config
    from megatron_opdlm.data.prompts import read_prompts
    from megatron_opdlm.evaluation.scoring import evaluate_student
    from megatron_opdlm.evaluation.verifiable_tasks import read_tasks
    from megatron_opdlm.observability.logging import set_up_logging
    from megatron_opdlm.parallel.initialize import initialize, rank, shut_down, world_size
    from megatron_opdlm.rollout.engine import RolloutEngine

    check_config(config, world_size())
    set_up_logging()
    source = open_student(config.student, config.rollout.stop_token_ids)
    data, results = config.data, {}
    work = []
    for file in config.evaluation.files:
        tasks = read_tasks(file)
        prompt_set = read_prompts(
            [file],
            source.tokenizer,
            max_prompt_tokens=data.max_prompt_tokens,
            apply_chat_template=data.apply_chat_template,
            enable_thinking=data.enable_thinking,
        )
        prompts = prompt_set.prompts[: config.evaluation.max_tasks]
        work.append((file, [tasks[prompt.prompt_id] for prompt in prompts], prompts))
    groups = initialize(config.parallel, config.training.seed)
    model = build_student(source, config, groups, padded_vocab_size(config, source.architecture))
    engine = RolloutEngine(model, config.rollout, source.special, config.training.seed)
    for file, tasks, prompts in work:
        scores, responses = evaluate_student(
            engine, tasks, prompts, source.tokenizer, max_new_tokens=config.rollout.max_new_tokens, group=groups.dp
        )
        results[file] = scores | {"rollout": dataclasses.asdict(config.rollout), "responses": responses}
        if rank() == 0:
            print(f"{file}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    if rank() == 0 and config.evaluation.output:
        Path(config.evaluation.output).write_text(json.dumps(results, indent=1) + "\n")
    shut_down()


if __name__ == "__main__":
    main(sys.argv[1:])
