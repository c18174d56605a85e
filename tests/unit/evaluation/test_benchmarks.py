"""The table of benchmarks: the paper's figures, and the README made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opdlm.evaluation.benchmarks import (
    BENCHMARKS,
    GROUPS,
    MODELS,
    TRAINING_FLOPS,
    TRAINING_TOKENS,
    benchmark,
    paper_scores,
    readme_tables,
)

README = Path(__file__).parents[3] / "megatron_opdlm" / "evaluation" / "README.md"
BEGIN, END = "<!-- begin: python -m megatron_opdlm.evaluation.benchmarks -->", "<!-- end -->"


def test_the_paper_has_sixteen_and_four_benchmarks():
    assert (len(GROUPS["opdlm"]), len(GROUPS["opdlm_multilingual"])) == (16, 4)
    for field in ("name", "task", "file"):
        assert len({getattr(row, field) for row in BENCHMARKS}) == 20


@pytest.mark.parametrize(
    ("model", "num_scores", "total"),
    [
        # sums of the columns of the paper's table 1
        ("SDAR-4B", 16, 671.1),
        ("OPDLM-4B", 16, 627.6),
        ("LLaDA-8B", 10, 368.8),
        ("Dream-7B", 10, 451.3),
        ("SDAR-8B", 16, 724.7),
        ("Fast-dLLM-v2-7B", 16, 593.4),
        ("OPDLM-8B", 16, 649.9),
    ],
)
def test_the_columns_of_the_main_table_are_whole(model, num_scores, total):
    scores = [row.scores[model] for row in BENCHMARKS if row.task in GROUPS["opdlm"] and model in row.scores]
    assert (len(scores), round(sum(scores), 1)) == (num_scores, total)


def test_scores_of_a_task_are_those_of_every_table():
    assert paper_scores("opdlm_aime24")["OPDLM-8B"] == 14.7
    assert paper_scores("opdlm_aime24")["OPDLM-MATH-8B-Thinking"] == 50.0
    assert paper_scores("opdlm_math500")["SDAR-4B-Chat"] == 70.2
    assert paper_scores("opdlm_aime25", thinking=True) == {"OPDLM-4B": 13.6, "OPDLM-8B": 19.4}
    assert paper_scores("opdlm_mmlu", thinking=True) == paper_scores("gsm8k") == {}
    assert paper_scores("opdlm_mlogiqa")["Fast-dLLM-v2-7B"] == 42.6
    assert benchmark("gsm8k") is None


def test_models_have_their_cost():
    assert tuple(TRAINING_TOKENS) == tuple(TRAINING_FLOPS) == MODELS
    # the paper's 6 N_s T + 2 N_t T for 8B: 8 * 8.2e9 * 0.066e9
    assert TRAINING_FLOPS["OPDLM-8B"] == pytest.approx(8 * 8.2e9 * TRAINING_TOKENS["OPDLM-8B"], rel=0.05)


def test_the_readme_has_the_tables():
    text = README.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.split(BEGIN)[1].split(END)[0].strip() == readme_tables()
