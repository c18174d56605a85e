"""Several responses to a document: figures worked out by hand."""

from __future__ import annotations

from itertools import combinations

import pytest

from megatron_opdlm.evaluation.aggregation import are_right_or_wrong, ks, majority, mean_and_error, pass_at_k


def test_the_mean_is_over_documents_and_its_error_that_of_their_means():
    mean, error = mean_and_error([[1, 0], [1, 1], [0, 0]])
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx((0.25 / 3) ** 0.5)  # means 0.5, 1, 0: variance 0.25


def test_a_single_document_has_no_error():
    assert mean_and_error([[1, 0, 0, 0]]) == (0.25, None)


def test_pass_at_k_of_a_document_by_hand():
    # of three responses, one right: two of the three pairs hold it
    assert pass_at_k([[0, 1, 0]], 2) == pytest.approx(2 / 3)
    assert pass_at_k([[0, 1, 0]], 3) == 1.0
    assert pass_at_k([[0, 1, 0], [0, 0, 0]], 2) == pytest.approx(1 / 3)


@pytest.mark.parametrize("row", [[0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_draws_with_a_right_response(row, k):
    draws = list(combinations(row, k))
    assert pass_at_k([row], k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


@pytest.mark.parametrize(
    ("num_responses", "expected"), [(1, []), (2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (9, [2, 4, 8, 9])]
)
def test_pass_at_k_is_stated_for_powers_of_two_and_for_all(num_responses, expected):
    assert ks(num_responses) == expected


def test_the_majority_is_the_most_frequent_answer():
    assert majority([["7", "8", "7"]], [[0, 1, 0]]) == 0.0
    assert majority([["8", "7", "7"], ["1", "1", "2"]], [[0, 1, 1], [1, 1, 0]]) == 1.0


def test_of_answers_as_frequent_the_first_wins():
    assert majority([["8", "7", "7", "8"]], [[1, 0, 0, 1]]) == 1.0
    assert majority([["7", "8", "8", "7"]], [[0, 1, 1, 0]]) == 0.0


def test_a_response_without_an_answer_has_no_vote():
    assert majority([[None, None, "3"]], [[0, 0, 1]]) == 1.0
    assert majority([[None, None]], [[0, 0]]) == 0.0


def test_parts_of_a_point_are_neither_right_nor_wrong():
    assert are_right_or_wrong([[1.0, 0.0], [True, False]])
    assert not are_right_or_wrong([[0.5, 1.0]])
