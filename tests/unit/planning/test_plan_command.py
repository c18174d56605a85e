"""`tools/plan.py` as it is called: what it prints, and what it refuses in one line."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tools.plan import main

TENSOR = ["--parallel.tensor_model_parallel_size", "4", "--parallel.sequence_parallel", "true"]


def test_a_plan_is_printed_as_tables_that_say_they_are_predictions(capsys):
    main(["--model", "qwen3-8b", "--num-gpus", "8", *TENSOR])
    printed = capsys.readouterr().out
    assert printed.startswith("TP4 DP2 on 8 x h100-80gb, micro-batch 1, recompute none: fits\n")
    assert "prediction" in printed and "| optimizer " in printed and "| rollout " in printed


def test_the_same_as_json_adds_up(capsys):
    main(["--model", "qwen3-8b", "--num-gpus", "8", "--json", *TENSOR])
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and max(plan["peak_gib"].values()) < plan["budget_gib"]
    assert plan["seconds"] == pytest.approx(sum(phase["seconds"] for phase in plan["phases"].values()))
    assert plan["mfu"] == pytest.approx(plan["flops"]["needed"] / (plan["seconds"] * 8 * 989e12))
    for phase in plan["phases"].values():
        assert phase["bound"] == max(phase["by_resource"], key=phase["by_resource"].get)


def test_a_search_shows_the_fastest_first_and_says_why_others_do_not_fit(capsys):
    main(["--model", "qwen3-14b", "--num-gpus", "8", "--search", "--json", "--show", "100"])
    found = json.loads(capsys.readouterr().out)
    seconds = [plan["seconds"] for plan in found["search"]]
    assert seconds == sorted(seconds) and all(plan["fits"] for plan in found["search"])
    assert not found["fits"]  # the recipe has no layout: one rank would hold all of the 14B
    reasons = Counter(reason.split("needs ")[0].split(": ")[1].strip() for reason in found["misfits"])
    assert reasons and set(reasons) <= {"student", "teacher", "rollout"}


def test_a_search_goes_on_where_the_recipes_own_layout_is_refused(capsys):
    main(["--model", "qwen3-0.6b", "--num-gpus", "16", "--search", "--show", "1"])
    printed = capsys.readouterr().out
    assert printed.startswith("the recipe's own layout: training.global_batch_size (8) must be a multiple of")
    assert "the fastest of" in printed and "refused by the rules of a run" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "qwen3-9b"], "--model (qwen3-9b) must be one of"),
        (["--model", "qwen3-8b", "--teacher-model", "qwen3-9b"], "--teacher-model (qwen3-9b) must be one of"),
        (["--student.hf", "models/9b"], "student.hf (models/9b) must be one of"),
        (["--model", "qwen3-8b", "--num-gpus", "0"], "--num-gpus (0) must be 1 or more"),
        (["--model", "qwen3-8b", "--search", "--show", "0"], "--show (0) must be 1 or more"),
        (["--model", "qwen3-8b", "--prompt-tokens", "0"], "--prompt-tokens (0) must lie between 1 and data.max_prompt"),
        (["--model", "qwen3-8b", "--prompt-tokens", "2049"], "--prompt-tokens (2049) must lie between"),
        ([], "give student.hf"),
        (["--model", "qwen3-8b", "--parallel.tensor_model_parallel_size", "16"], "must divide num"),
        (
            ["--model", "qwen3-8b", "--parallel.expert_model_parallel_size", "2"],
            "neither student nor teacher has experts",
        ),
        (["--model", "qwen3-8b", "--lora.rank", "8"], "lora.rank (8) must be 0"),
        (["--model", "qwen3-8b", "--tokens-per-step", "5"], "--tokens-per-step (5.0) must lie between"),
        (["--model", "qwen3-8b", "--rollout.blok_size", "8"], "the nearest is rollout.block_size"),
        (["--model", "qwen3-8b", "--num-gpus", "16"], "global_batch_size (8) must be a multiple of"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(arguments, words, capsys):
    gpus = [] if "--num-gpus" in arguments else ["--num-gpus", "16" if "16" in arguments else "8"]
    with pytest.raises(SystemExit) as exit_info:
        main([*gpus, *arguments])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.count("\n") == 1 and words in error
