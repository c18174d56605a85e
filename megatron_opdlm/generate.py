"""Answer prompts, or chat, with a block-diffusion student, and see it denoise.

    python -m megatron_opdlm.generate --hf student --prompt "1 + 1 =" --rollout.temperature 0
    python -m megatron_opdlm.generate --checkpoint runs/mine --prompts questions.jsonl --json --output answers.jsonl
    torchrun --nproc-per-node 2 -m megatron_opdlm.generate --hf student --parallel.tensor_model_parallel_size 2

The last one is a chat. The student decodes with the engine that training and evaluation use, on any layout; rank 0
reads and prints. Answers go to stdout, what is said about them to stderr.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from megatron_opdlm.config.errors import user_errors
from megatron_opdlm.terminal.arguments import Arguments, parse_arguments

if TYPE_CHECKING:
    from megatron_opdlm.data.prompts import Row
    from megatron_opdlm.terminal.student import Student


def main(arguments: list[str] | None = None) -> None:
    """Parses, checks, decodes, prints. A user's mistake ends in one line and exit code 2."""
    try:
        with user_errors():
            _generate(parse_arguments(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough; nothing may be written when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _generate(arguments: Arguments) -> None:
    # torch and Megatron are imported only when there is something to decode, so `--help` answers at once
    from megatron_opdlm.config.check import check_layout
    from megatron_opdlm.observability.logging import set_up_logging
    from megatron_opdlm.parallel.initialize import rank, shut_down, world_size
    from megatron_opdlm.terminal.questions import read_questions
    from megatron_opdlm.terminal.student import Student

    check_layout(arguments.config.parallel, world_size())
    is_first = rank() == 0
    rows = [] if arguments.is_chat or not is_first else read_questions(arguments.prompt, arguments.prompts)
    set_up_logging(logging.WARNING)
    student = Student(arguments.config)
    if is_first:
        _lead(student, arguments, rows)
    else:
        student.load()
        student.follow()
    shut_down()


def _lead(student: Student, arguments: Arguments, rows: list[Row]) -> None:
    from megatron_opdlm.terminal.answers import record_to
    from megatron_opdlm.terminal.batch import answer_all
    from megatron_opdlm.terminal.chat import Chat
    from megatron_opdlm.terminal.questions import tokenize_questions
    from megatron_opdlm.terminal.screens import build_screen

    data = arguments.config.data
    prompts = tokenize_questions(rows, student.tokenizer, data)
    for prompt in prompts:
        student.check_length(prompt)
    screen = build_screen(student, as_json=arguments.json, show_steps=arguments.show_steps)
    with screen.loading(student.opened.folder):
        student.load()
    with record_to(arguments.output) as record:
        if arguments.is_chat:
            Chat(student, screen, data, record).run()
        else:
            answer_all(student, screen, prompts, record)
    student.dismiss()


if __name__ == "__main__":
    main(sys.argv[1:])
