"""The divergence with its vocabulary split over two ranks is the one of the whole vocabulary."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.config.schema import DivergenceConfig
from megatron_opdlm.distillation.teacher_filters import filter_target_
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard, global_argmax, global_top_k
from tests.ranks import run_on_ranks
from tests.slow_divergences import (
    CASES,
    MASK_TOKEN_ID,
    NUM_ROWS,
    VOCAB_SIZE,
    assert_same,
    label,
    plain_divergence,
    random_inputs,
    target_slowly,
    with_gradients,
)

RUNS = [
    *itertools.product([torch.float64], [1, 7, 100], CASES),
    *itertools.product([torch.float32], [7], CASES),
]
TIED_LOGITS = [2.0, 1.0, 2.0, 0.0, 1.0, 2.0, 1.0, -math.inf]
TIE_FILTERS = [
    *({"teacher_top_k": k} for k in range(1, 9)),
    *({"teacher_top_p": p} for p in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99)),
    *({"teacher_min_p": p} for p in (0.1, 0.2, 0.5, 1.0)),
    {"teacher_temperature": 2.0, "teacher_top_k": 6, "teacher_top_p": 0.8, "teacher_min_p": 0.7},
]
WIDTHS = (32, 512)
LARGEST_ON_THE_SECOND_RANK = [0.0, 1.0, 0.0, 1.0, -1.0, 3.0, 3.0, 0.0]


def on_rank(rank: int) -> dict[str, Any]:
    """What each test looks at, in one start of the processes."""
    functions = (
        every_run,
        numbers_sent,
        filtered_ties,
        top_k_of_tied_logits,
        argmax_of_two_logits,
        loss_of_no_positions,
    )
    return {function.__name__: function(rank) for function in functions}


def shard_of(rank: int, num_rows: int, **fields: Any) -> VocabularyShard:
    return VocabularyShard(rank * num_rows, num_rows, group=dist.group.WORLD, **fields)


def every_run(rank: int) -> list[dict[str, torch.Tensor]]:
    shard = shard_of(rank, NUM_ROWS // 2, vocab_size=VOCAB_SIZE, mask_token_id=MASK_TOKEN_ID)
    results = []
    for dtype, chunk_size, case in RUNS:
        inputs = random_inputs(dtype)
        for name in ("student_weight_VH", "teacher_weight_VH"):
            rows = inputs[name].detach()[shard.first : shard.first + shard.num_rows]
            inputs[name] = rows.clone().requires_grad_(name.startswith("student"))
        results.append(with_gradients(inputs, DivergenceConfig(chunk_size=chunk_size, **case), shard))
    return results


def top_k_of_tied_logits(rank: int) -> list[list[int]]:
    shard = shard_of(rank, 4, vocab_size=8, mask_token_id=8)
    logits_NV = torch.tensor([TIED_LOGITS[shard.first : shard.first + 4]])
    return [global_top_k(logits_NV, k, shard)[0].tolist() for k in range(1, 10)]


def argmax_of_two_logits(rank: int) -> tuple[list[float], list[float]]:
    shard = shard_of(rank, 4, vocab_size=8, mask_token_id=8)
    both = [
        torch.tensor([logits])[:, shard.first : shard.first + 4] for logits in (TIED_LOGITS, LARGEST_ON_THE_SECOND_RANK)
    ]
    largest_LN, ids_LN = global_argmax(both, shard)
    return largest_LN[:, 0].tolist(), ids_LN[:, 0].tolist()


def loss_of_no_positions(rank: int) -> float:
    shard = shard_of(rank, NUM_ROWS, vocab_size=VOCAB_SIZE, mask_token_id=MASK_TOKEN_ID)
    inputs = {name: value if "weight_VH" in name else value[:0] for name, value in random_inputs().items()}
    inputs["student_hidden_NH"].retain_grad()
    return with_gradients(inputs, DivergenceConfig(chunk_size=4, top_k=3), shard)["loss"].item()


def filtered_ties(rank: int) -> list[list[float]]:
    """What each filter leaves of this rank's half of tied logits."""
    shard, left = shard_of(rank, 4, vocab_size=8, mask_token_id=8), []
    for filters in TIE_FILTERS:
        logits_CV = torch.tensor([TIED_LOGITS[shard.first : shard.first + 4]])
        filter_target_(logits_CV, DivergenceConfig(**filters), shard)
        left.append(logits_CV[0].tolist())
    return left


def numbers_sent(rank: int) -> dict[tuple[int, int], int]:
    """(case, width) -> the most numbers that one collective of the forward and backward takes from this rank."""
    return {
        (case, width): largest_message(DivergenceConfig(chunk_size=9, **CASES[case]), rank, width)
        for case in range(len(CASES))
        for width in WIDTHS
    }


def largest_message(settings: DivergenceConfig, rank: int, width: int) -> int:
    sent, originals = [], (dist.all_gather, dist.all_reduce)

    def all_gather(gathered, values, group):
        sent.append(values.numel())
        originals[0](gathered, values, group=group)

    def all_reduce(values, group):
        sent.append(values.numel())
        originals[1](values, group=group)

    inputs = {name: value for name, value in random_inputs().items() if "weight_VH" not in name}
    for name, hidden in (("student_weight_VH", 5), ("teacher_weight_VH", 6)):
        inputs[name] = torch.randn(width, hidden, dtype=torch.float64, requires_grad=name.startswith("student"))
    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    with_gradients(inputs, settings, shard_of(rank, width, vocab_size=2 * width, mask_token_id=0))
    dist.all_gather, dist.all_reduce = originals
    return max(sent)


def fail_on_the_second_rank(rank: int) -> None:
    if rank == 1:
        raise LookupError("the reason")
    dist.barrier()


@pytest.fixture(scope="module")
def both_ranks() -> list[dict[str, Any]]:
    return run_on_ranks(on_rank, 2)


@pytest.mark.parametrize("run", range(len(RUNS)), ids=[f"{dtype} {size} {label(case)}" for dtype, size, case in RUNS])
def test_values_and_gradients_on_two_ranks_match_the_plain_formula(both_ranks, run):
    first, second = (results["every_run"][run] for results in both_ranks)
    dtype, _, case = RUNS[run]
    whole_weight = {"weight_gradient": torch.cat([first["weight_gradient"], second["weight_gradient"]])}
    expected = plain_divergence(random_inputs(dtype), DivergenceConfig(**case))
    for actual in (first, second):
        assert_same(actual | whole_weight, expected, 1e-12 if dtype == torch.float64 else 1e-5)


def test_top_k_over_two_ranks_is_the_stable_descending_sort(both_ranks):
    expected = sorted(range(8), key=lambda i: (-TIED_LOGITS[i], i))
    for results in both_ranks:
        assert results["top_k_of_tied_logits"] == [expected[:k] for k in range(1, 10)]


def test_argmax_over_two_ranks_is_the_lowest_id_of_the_largest_logit(both_ranks):
    for results in both_ranks:
        assert results["argmax_of_two_logits"] == ([2.0, 3.0], [0.0, 5.0])


def test_no_message_grows_with_the_vocabulary(both_ranks):
    for results in both_ranks:
        for case in range(len(CASES)):
            num_candidates = max(CASES[case].get("top_k", 0), CASES[case].get("teacher_top_k", 0))
            narrow, wide = (results["numbers_sent"][case, width] for width in WIDTHS)
            assert narrow == wide <= 9 * max(5, 2 * num_candidates), label(CASES[case])


def test_filters_over_two_ranks_leave_what_they_leave_on_one(both_ranks):
    for place, filters in enumerate(TIE_FILTERS):
        halves = [results["filtered_ties"][place] for results in both_ranks]
        actual = torch.tensor(halves).flatten().double().softmax(0).tolist()
        assert actual == pytest.approx(target_slowly(TIED_LOGITS, DivergenceConfig(**filters)), abs=1e-6), filters


def test_no_positions_leave_the_ranks_in_step(both_ranks):
    assert [results["loss_of_no_positions"] for results in both_ranks] == [0.0, 0.0]


def test_a_failing_rank_ends_the_others_and_shows_its_traceback():
    with pytest.raises(RuntimeError, match=r"on rank 1:[\s\S]*fail_on_the_second_rank[\s\S]*LookupError: the reason"):
        run_on_ranks(fail_on_the_second_rank, 2)
