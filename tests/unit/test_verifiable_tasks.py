"""Reading tasks with known answers, and scoring responses to them, against rows and scores written by hand."""

from __future__ import annotations

import json
import sys

import pytest

from megatron_opdlm.evaluation import verifiable_tasks
from megatron_opdlm.evaluation.verifiable_tasks import extract_answer, read_tasks, score_response

TASK = {"question": "23 + 45 - 7 =", "source": "reasoning_gym/chain_sum", "entry": {"answer": "61", "metadata": {}}}


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("23+45=68\n68-7=61", "61"),
        ("5-9=-4", "-4"),
        ("x = 1,204.5.", "1,204.5"),
        ("5 = +5<|im_end|>7", "+5"),
        ("2+2=4\n4+1=", "4"),
        ("2+2=\n4", None),
        ("61", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_number_that_follows_an_equals_sign(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize("response", ["23+45=68\n68-7=61", "=61", "=061", "=61.0"])
def test_a_response_with_the_right_value_scores_one(response):
    assert score_response(TASK, response) == 1.0


@pytest.mark.parametrize(
    ("response", "score"),
    [("23+45=68\n68-7=60", 0.0), ("68-7=-61", 2 / 3), ("=61\n61+1=62", 0.0), ("61", 0.0), ("", 0.0)],
)
def test_a_wrong_or_missing_answer_scores_less_than_one(response, score):
    assert score_response(TASK, response) == pytest.approx(score)


def test_each_data_set_is_scored_by_its_own_verifier():
    import reasoning_gym

    entry = reasoning_gym.create_dataset("gcd", size=1, seed=3)[0]
    task = {"question": entry["question"], "source": "reasoning_gym/gcd", "entry": entry}
    assert score_response(task, f"gcd={entry['answer']}") == 1.0
    assert score_response(task, f"gcd={int(entry['answer']) + 1}") < 1.0


@pytest.mark.parametrize("source", ["gsm8k", "reasoning_gym/no_such_set"])
def test_a_source_without_a_verifier_is_refused_by_name(source):
    with pytest.raises(ValueError, match=f"source \\({source}\\)"):
        score_response(TASK | {"source": source}, "=61")


def test_a_missing_reasoning_gym_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    verifiable_tasks.load_verifier.cache_clear()
    with pytest.raises(ValueError, match=r'pip install "megatron-opdlm\[evaluation\]"'):
        score_response(TASK, "=61")


def test_tasks_are_read_in_order_without_empty_lines(tmp_path):
    path = tmp_path / "tasks.jsonl"
    other = TASK | {"question": "1 + 1 =\u2028"}
    path.write_text(json.dumps(TASK) + "\n\n" + json.dumps(other, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_tasks(path) == [TASK, other]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": ', "not JSON"),
        ('["question"]', "must be a JSON object, not list"),
        ('{"question": "1 + 1 ="}', "must have source, entry"),
        ('{"question": "1 + 1 =", "source": "reasoning_gym/chain_sum", "entry": "2"}', "`entry` must be a JSON object"),
        ('{"question": "1 + 1 =", "source": 7, "entry": {}}', "`source` must be text"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(TASK) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"tasks.jsonl:3: .*{reason}"):
        read_tasks(path)
