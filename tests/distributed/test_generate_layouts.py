"""`generate` prints the same on any layout, once."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from megatron_opdlm.config.schema import ParallelConfig, RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import LAYOUTS, remove_parallel_groups, tiny_config

LENGTHS = (3, 11, 4, 7, 1)


def print_answers(rank: int, folder: Path, layouts: list[str]) -> dict[str, str]:
    """Layout -> what this rank has written to stdout, in two calls, of which the second one has a single prompt."""
    return {name: _print_answers(rank, folder, LAYOUTS[name]) for name in layouts}


def _print_answers(rank: int, folder: Path, parallel: ParallelConfig) -> str:
    from megatron_opdlm.terminal.batch import answer_all
    from megatron_opdlm.terminal.screens import JsonScreen
    from megatron_opdlm.terminal.student import Student

    rollout = RolloutConfig(max_new_tokens=9, temperature=0.0, num_responses_per_prompt=2, dynamic_threshold=0.12)
    prompts = [Prompt(row, tuple(range(row, row + length))) for row, length in enumerate(LENGTHS)]
    student = Student(tiny_config(folder, rollout=rollout, parallel=parallel))
    student.load()
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()):
        if rank == 0:
            for asked in (prompts, prompts[:1]):
                answer_all(student, JsonScreen(student, show_steps=False), asked, record=lambda answer: None)
            student.dismiss()
        else:
            student.follow()
    remove_parallel_groups()
    return stdout.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("hf"), seed=5)


def test_two_ranks_print_what_one_rank_prints_and_only_the_first_of_them_does(folder):
    (alone,) = run_on_ranks(print_answers, 1, folder, ["tensor parallel 1"])
    printed = alone["tensor parallel 1"]
    lengths = [len(json.loads(line)["prompt_ids"]) for line in printed.splitlines()]
    assert lengths == [length for length in (*LENGTHS, LENGTHS[0]) for _ in range(2)], "in the order of the prompts"
    first, second = run_on_ranks(print_answers, 2, folder, list(LAYOUTS))
    assert first == dict.fromkeys(LAYOUTS, printed)
    assert second == dict.fromkeys(LAYOUTS, "")
