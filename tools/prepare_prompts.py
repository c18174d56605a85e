"""Public data sets, or files of your own -> Parquet files of prompts to train on.

    python tools/prepare_prompts.py --mix opdlm --tokenizer Qwen3-4B --evaluation-data eval_data --output prompts

Each question gets the template of its domain; prompts over `--max-prompt-tokens`, questions that stand in an evaluation
set, and those that came before are dropped and counted (`statistics.md`). The same command goes on after a stop. Mixes:
`opdlm`, `math`, `codeforces` (megatron_opdlm/data/preparation/mixes.py), or a YAML file. `--evaluation-data` is a
folder as `evaluation.data_dir` wants it.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    arguments = _parser().parse_args()

    from megatron_opdlm.config.errors import user_errors

    with user_errors():
        _prepare(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", required=True, help="opdlm, math, codeforces or a YAML file with sources")
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder of the model that will be trained")
    parser.add_argument("--output", required=True, type=Path, help="folder of the shards")
    evaluation = parser.add_mutually_exclusive_group(required=True)
    evaluation.add_argument("--evaluation-data", type=Path, help="folder of the evaluation sets to keep apart from")
    evaluation.add_argument("--no-evaluation-data", action="store_true", help="do not compare with evaluation sets")
    parser.add_argument("--benchmarks", help="tasks to keep apart from, with commas between; default: all twenty")
    parser.add_argument("--ngram", type=int, default=13, help="words in a row that make an overlap (default: 13)")
    parser.add_argument("--max-prompt-tokens", type=int, default=2048, help="as data.max_prompt_tokens (default: 2048)")
    parser.add_argument("--enable-thinking", action="store_true", help="as data.enable_thinking")
    parser.add_argument("--no-chat-template", action="store_true", help="for data.apply_chat_template: false")
    parser.add_argument("--rows-per-shard", type=int, default=10_000, help="(default: 10000)")
    parser.add_argument("--seed", type=int, default=1234, help="of the order of rows (default: 1234)")
    return parser


def _prepare(arguments: argparse.Namespace) -> None:
    for name in ("ngram", "max_prompt_tokens", "rows_per_shard"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} ({getattr(arguments, name)}) must be at least 1")

    from megatron_opdlm.data.preparation.checks import RowChecks
    from megatron_opdlm.data.preparation.mixes import read_mix
    from megatron_opdlm.data.preparation.overlap import EvaluationQuestions
    from megatron_opdlm.data.preparation.prepare import Settings, prepare
    from megatron_opdlm.data.preparation.statistics import markdown
    from megatron_opdlm.data.tokenizer import load_tokenizer
    from megatron_opdlm.observability.logging import set_up_logging

    set_up_logging()
    sources = read_mix(arguments.mix)
    tokenizer = load_tokenizer(arguments.tokenizer)
    if not arguments.no_chat_template and not tokenizer.chat_template:
        raise ValueError(f"{arguments.tokenizer}: no chat template there; give --no-chat-template")
    questions = _evaluation_questions(arguments)
    checks = RowChecks(
        tokenizer,
        EvaluationQuestions(questions, arguments.ngram),
        max_prompt_tokens=arguments.max_prompt_tokens,
        apply_chat_template=not arguments.no_chat_template,
        enable_thinking=arguments.enable_thinking,
    )
    settings = Settings(seed=arguments.seed, rows_per_shard=arguments.rows_per_shard)
    identity = _identity(arguments, questions, tokenizer.chat_template)
    print(markdown(prepare(sources, checks, settings, identity, arguments.output)))


def _evaluation_questions(arguments: argparse.Namespace) -> list[str]:
    """The questions of the benchmarks' files; ValueError for one that is not there, with the command that gets it."""
    from megatron_opdlm.evaluation.benchmarks import BENCHMARKS
    from megatron_opdlm.evaluation.tasks.rows import check_rows, read_file

    if arguments.no_evaluation_data:
        return []
    table = {row.task: row for row in BENCHMARKS}
    wanted = arguments.benchmarks.split(",") if arguments.benchmarks else list(table)
    if unknown := [task for task in wanted if task not in table]:
        raise ValueError(f"--benchmarks ({', '.join(unknown)}) must be of {', '.join(table)}")
    questions = []
    for task in wanted:
        place, rows = read_file(arguments.evaluation_data, table[task])
        check_rows(rows, task, place)
        questions += [str(row["question"]) for row in rows]
    return questions


def _identity(arguments: argparse.Namespace, questions: list[str], chat_template: str | None) -> dict[str, object]:
    """What the checks depend on."""
    import hashlib
    import json

    from megatron_opdlm.data.preparation.templates import TEMPLATES
    from megatron_opdlm.data.tokenizer import VOCABULARY_FILES

    files = [arguments.tokenizer / name for name in VOCABULARY_FILES]
    content = [file.read_bytes() for file in files if file.is_file()]
    return {
        "tokenizer": hashlib.sha256(b"".join([*content, str(chat_template).encode()])).hexdigest(),
        "evaluation_questions": hashlib.sha256(json.dumps([questions, TEMPLATES]).encode()).hexdigest(),
        **{name: getattr(arguments, name) for name in ("ngram", "max_prompt_tokens")},
        **{name: getattr(arguments, name) for name in ("enable_thinking", "no_chat_template")},
    }


if __name__ == "__main__":
    main()
