"""Reading answers: mathematics, letters, grids, and what LiveBench's tasks ask for, by cases worked out by hand."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from megatron_opdlm.evaluation.answers import livebench_words
from megatron_opdlm.evaluation.answers.choice_answers import choice_answer, right_letter
from megatron_opdlm.evaluation.answers.final_text import final_text
from megatron_opdlm.evaluation.answers.instruction_answers import follow_instructions
from megatron_opdlm.evaluation.answers.livebench_answers import score_livebench
from megatron_opdlm.evaluation.answers.math_answers import boxes, check_math, last_boxes
from megatron_opdlm.evaluation.answers.math_process import MathProcess
from megatron_opdlm.evaluation.answers.zebra_answers import json_objects, zebra_cells


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>a</think>\n\n b <|im_end|>c", " b "),
        ("<think>a</think>x</think>\ny", "y"),
        ("<think>never ends", "<think>never ends"),
        ("    return 1<|endoftext|>", "    return 1"),
    ],
)
def test_the_final_text_is_behind_the_thoughts_and_before_the_end_token(response, answer):
    assert final_text(response) == answer


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"\boxed{\frac{1}{2}} and \fbox{3}", [r"\frac{1}{2}", "3"]),
        (r"\boxed{never closed \frac{1}{2}", []),
        (r"\boxed {4}", ["4"]),
        ("none", []),
    ],
)
def test_boxes_are_found_by_their_braces(text, contents):
    assert [content for _, _, content in boxes(text)] == contents


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{3}. Wait, no: \boxed{4}", r"\boxed{4}"),
        (r"$\boxed{3}$, $\boxed{4}$ and \boxed{5}.", r"\boxed{3}, \boxed{4}, \boxed{5}"),
        (r"\boxed{1} is out; \boxed{2} or \boxed{3}", r"\boxed{2}, \boxed{3}"),
        (r"\boxed{7} \boxed{}", r"\boxed{7}"),
        ("7", ""),
    ],
)
def test_boxes_in_a_row_are_one_answer(text, boxed):
    assert last_boxes(text) == boxed


@pytest.mark.parametrize(
    ("right", "text", "is_correct"),
    [
        ("18", r"\boxed{18}", True),
        ("18", r"So 3 + 15 makes 18.", True),
        ("18", r"\boxed{18.5}", False),
        ("2,500", r"\boxed{2500}", True),
        ("025", r"\boxed{25}", True),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        (r"11\sqrt{2}", r"The answer is $\sqrt{242}$.", True),
        (r"x^2 + 2x + 1", r"\boxed{(x+1)^2}", True),
        (r"\left(3, \frac{\pi}{2}\right)", r"\boxed{(3, \pi/2)}", True),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
        (r"\text{Evelyn}", r"\boxed{\text{Ida}}", False),
        ("3, 5", r"\boxed{5} and \boxed{3}", True),
        ("4", r"first \boxed{3}, which is wrong, then \boxed{4}", True),
        ("3", r"first \boxed{3}, which is wrong, then \boxed{4}", False),
        ("18", "", False),
    ],
)
def test_a_mathematical_answer_counts_if_it_is_equal(right, text, is_correct):
    assert check_math(right, text).is_correct is is_correct


def test_equal_answers_are_spelt_alike():
    spellings = [check_math("1", rf"\boxed{{{answer}}}").answer for answer in (r"\frac{1}{2}", r"\dfrac12", "1/2")]
    assert spellings == ["1/2"] * 3
    assert check_math("1", "no number here").answer is None


@pytest.fixture(scope="module")
def process():
    checker = MathProcess()
    yield checker
    checker.close()


def test_a_check_in_the_process_is_the_same_check(process):
    cases = [("18", r"\boxed{18}"), ("18", r"\boxed{19}"), ("é", "é \n \\boxed{\\frac12}"), ("1", "")]
    assert [process.check(*case) for case in cases] == [check_math(*case) for case in cases]


def test_threads_can_check(process):
    found = []
    threads = [threading.Thread(target=lambda: found.append(process.check("2", r"\boxed{2}"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdict.is_correct for verdict in found] == [True] * 3


def test_a_process_that_was_ended_is_started_again(process):
    assert process.check("2", r"\boxed{2}").is_correct
    process._process.kill()
    process._process.wait()
    assert process.check("2", r"\boxed{2}").is_correct


def test_a_check_without_end_counts_as_wrong_and_the_next_one_goes_on(process):
    process.check("1", "1")
    process.limit_s, started = 0.5, time.monotonic()
    assert not process.check("3", r"\boxed{9^{9^{9^{9}}}}").is_correct
    assert time.monotonic() - started < 5
    process.limit_s = 20.0
    assert process.check("3", r"\boxed{3}").is_correct


@pytest.mark.parametrize(
    ("text", "letters", "letter"),
    [
        (r"\boxed{C}", "ABCD", "C"),
        (r"\boxed{\text{(c) } 5}", "ABCD", "C"),
        (r'"answer": "B". \boxed{D}', "ABCD", "D"),
        (r"\boxed{Cat}", "ABCD", None),
        ('A or B? "answer": "B"', "ABCD", "B"),
        ('{"answer": "a"} no, {"answer": "d"}', "ABCD", "D"),
        ("**Answer:** **(C)** five", "ABCD", "C"),
        ("Answer: option J", "ABCDEFGHIJ", "J"),
        ("Answer: J", "ABCD", None),
        ("答案是 answer：B", "ABCD", "B"),
        ("The correct answer is:\n\n**C** five", "ABCD", "C"),
        ("The answer is a matter of taste", "ABCD", None),
        ("the answer is option A, not B", "ABCD", "A"),
        ("A and B fail, so C fits.", "ABCD", "C"),
        ("I think it is E", "ABCD", None),
        ("D's point", "ABCD", None),
        ("", "ABCD", None),
    ],
)
def test_a_letter_is_read_by_the_first_rule_that_finds_one(text, letters, letter):
    assert choice_answer(text, letters) == letter


def test_the_right_letter_may_be_in_parentheses():
    assert [right_letter(answer) for answer in ("C", "(C)", "c", " C. ")] == ["C"] * 4


GRID = {"header": ["House", "Name", "Phone Model"], "rows": [["1", "Ida", "pixel 6"], ["2", "Otto", "iphone 13"]]}


@pytest.mark.parametrize(
    ("text", "num_right"),
    [
        ('{"House 1": {"Name": "ida ", "phone_model": "Pixel 6"}, "house2": {"Name": "Otto"}}', 3),
        ('{"solution": {"1": {"Name": "Ida"}, "2": {}}}', 1),
        ('{"solution": {"House 1": "Ida"}}', 0),
        ('{"a": 1} then {"solution": {"House 2": {"Name": "Otto"}}} and {"b": 2}', 1),
        ('{"solution": {"House 1": {"Name": "Otto"}}} no: {"solution": {"House 1": {"Name": "Ida"}}}', 1),
        ("{{{", 0),
    ],
)
def test_grids_count_their_right_cells(text, num_right):
    assert zebra_cells(GRID, text) == (num_right, 4)


def test_json_objects_are_the_outermost_ones():
    assert json_objects('x {"a": {"b": 1}} {bad {"c": 2}') == [{"a": {"b": 1}}, {"c": 2}]


def test_edit_distance_is_the_fewest_changes():
    assert livebench_words.edit_distance("kitten", "sitting") == 3
    assert livebench_words.edit_distance([], [1, 2]) == 2
    assert livebench_words.edit_distance([1, 2, 3], [1, 2, 3]) == 0


def test_a_livebench_task_without_a_scorer_is_refused():
    row = {"livebench_category": "reasoning", "livebench_task": "theory_of_mind", "ground_truth_answer": ""}
    with pytest.raises(ValueError, match=r"LiveBench task reasoning/theory_of_mind has no scorer \(there are: coding/"):
        score_livebench(row, "")


def test_what_is_not_installed_is_named_with_the_command_that_gets_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs math-verify: pip install "math-verify\[antlr4_13_2\]"'):
        MathProcess().check("1", "1")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval", None)
    with pytest.raises(ValueError, match=r'IFEval needs lm_eval.tasks.ifeval: pip install "lm-eval\[ifeval\]"'):
        follow_instructions({"question": "", "instruction_id_list": [], "kwargs": []}, "")
