"""Which questions are the same or stand in an evaluation set; the oracle compares all with all, word by word."""

from __future__ import annotations

import re

import numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_opdlm.data.preparation.overlap import (
    MAX_QUESTIONS_PER_NGRAM,
    EvaluationQuestions,
    ngram_hashes,
    same_key,
    words,
)

# A tiny vocabulary, so that questions overlap often.
QUESTIONS = st.lists(st.sampled_from(["a", "B", "c,", "D!", "e"]), max_size=9).map(" ".join)


def slow_words(text):
    return re.findall("[a-z0-9]+", text.lower())


def slow_holds(question, evaluation, ngram):
    """Compares every run of words with every run of every evaluation question."""
    if any(question.lower().split() == other.lower().split() for other in evaluation):
        return True
    different = {" ".join(other.lower().split()) for other in evaluation}
    mine = slow_words(question)
    for start in range(len(mine) - ngram + 1):
        run = mine[start : start + ngram]
        holders = 0
        for other in different:
            theirs = slow_words(other)
            holders += any(theirs[place : place + ngram] == run for place in range(len(theirs)))
        if 1 <= holders <= MAX_QUESTIONS_PER_NGRAM:
            return True
    return False


@given(question=QUESTIONS, evaluation=st.lists(QUESTIONS, max_size=20), ngram=st.integers(1, 4))
@example(question="a b c", evaluation=[f"a b c {number}" for number in range(MAX_QUESTIONS_PER_NGRAM)], ngram=3)
@example(question="a b c", evaluation=[f"a b c {number}" for number in range(MAX_QUESTIONS_PER_NGRAM + 1)], ngram=3)
@settings(max_examples=60, deadline=None)
def test_overlap_is_what_comparing_all_with_all_finds(question, evaluation, ngram):
    assert EvaluationQuestions(evaluation, ngram).holds(question) == slow_holds(question, evaluation, ngram)


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not():
    evaluation = EvaluationQuestions(["one two three four five six seven eight nine ten eleven twelve thirteen"], 13)
    assert evaluation.holds("Zero, one two three FOUR five (six) seven eight nine ten eleven twelve thirteen fourteen?")
    assert not evaluation.holds("one two three four five six seven eight nine ten eleven twelve")
    assert not evaluation.holds("one two three four five six seven, and eight nine ten eleven twelve thirteen")


def test_boilerplate_of_many_questions_is_no_overlap():
    puzzles = [f"There are five houses in a row, and number {number} is red" for number in range(20)]
    evaluation = EvaluationQuestions(puzzles, ngram=5)
    assert not evaluation.holds("There are five houses in a row.")
    assert evaluation.holds("So row, and number 7 is red.")


def test_the_same_question_asked_twice_is_one_question():
    assert len(EvaluationQuestions(["A  b c", "a b C", "a b d"], 13)) == 2


def test_case_spaces_and_compatible_letters_do_not_matter_and_signs_do():
    assert same_key("What is ２+3?\n") == same_key("what  IS 2+3?")
    assert same_key("2+3") != same_key("2-3")
    assert len(same_key("")) == 16


def test_letters_of_scripts_without_spaces_are_words():
    assert words("求 x_1 的最大值。") == ["求", "x", "1", "的", "最", "大", "值"]
    assert words("Größe, naïve; don't") == ["grösse", "naïve", "don", "t"]


def test_a_text_shorter_than_a_run_has_no_runs():
    assert ngram_hashes("one two", 3).dtype == numpy.uint64
    assert len(ngram_hashes("one two", 3)) == 0
    assert len(ngram_hashes("a b a b a b", 2)) == 2  # a b, b a
