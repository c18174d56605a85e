"""The study's table by hand: who reaches the target with how many tokens, and what a seed that never does leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "data_efficiency"


@pytest.fixture
def summarize(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.delitem(sys.modules, "summarize", raising=False)
    import summarize

    yield summarize
    sys.modules.pop("summarize")


def points(method: str, seed: int, accuracies: list[float], tokens_per_step: int) -> list[dict]:
    return [
        {
            "method": method,
            "seed": seed,
            "step": 15 * place,
            "accuracy": accuracy,
            "trained_tokens": tokens_per_step * place,
            "response_tokens": 2 * tokens_per_step * place,
        }
        for place, accuracy in enumerate(accuracies, start=1)
    ]


def test_the_first_checkpoint_at_the_target_counts_even_if_a_later_one_falls_below(summarize):
    run = points("lift", 1, [0.2, 0.9, 0.8, 0.95], 100)
    assert summarize.tokens_until(run, 0.9) == 200
    assert summarize.tokens_until(run, 0.96) is None


def test_methods_are_compared_by_the_mean_over_seeds_and_not_at_all_if_a_seed_never_gets_there(summarize):
    scores = points("on_policy_distillation", 1, [0.5, 0.9], 10) + points("on_policy_distillation", 2, [0.9, 0.8], 20)
    scores += points("sft_sdar", 1, [0.1, 0.2, 0.9], 30) + points("sft_sdar", 2, [0.1, 0.2, 0.85], 30)
    scores += points("lift", 1, [0.5, 0.9], 40) + points("lift", 2, [0.9, 0.9], 40)
    summary = summarize.summarize(scores, teacher_accuracy=1.0)
    ours, sft, lift = (summary["methods"][name] for name in ("on_policy_distillation", "sft_sdar", "lift"))
    assert summary["target"] == 0.9
    assert ours["trained_tokens_until_target"] == [20, 20] and ours["mean_trained_tokens_until_target"] == 20
    assert ours["last_accuracy"] == pytest.approx(0.85) and ours["trained_tokens"] == 30
    assert sft["trained_tokens_until_target"] == [90, None] and sft["mean_trained_tokens_until_target"] is None
    assert lift["mean_trained_tokens_until_target"] == 60
    table = summarize.table(summary)
    assert "| SFT, preset sdar | 0.875 | 90 | 1 of 2 seeds reach it | > 4.50 |" in table
    assert "| LIFT | 0.900 | 80 | 60 | 3.00 |" in table
