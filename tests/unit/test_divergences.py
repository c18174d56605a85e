"""The chunked divergence on one rank, against the plainly written formula in float64 with autograd."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_opdlm.config.schema import DivergenceConfig
from megatron_opdlm.distillation.chunked_loss import DivergenceResult, divergence_loss
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard, global_top_k
from tests.slow_divergences import (
    CASES,
    KINDS,
    MASK_TOKEN_ID,
    NUM_POSITIONS,
    NUM_ROWS,
    WHOLE,
    assert_same,
    divergence_slowly,
    label,
    plain_divergence,
    random_inputs,
    with_gradients,
)

FULL = DivergenceConfig(chunk_size=4)
TOP_3 = DivergenceConfig(chunk_size=4, top_k=3)
TAILS = ["renormalize", "bucket"]
FAIR_COIN, BENT_COIN = (torch.tensor([p]).log().double() for p in ([0.5, 0.5], [0.25, 0.75]))
# KL(fair || bent) and KL(bent || fair), worked out by hand
FORWARD, REVERSE = 0.5 * math.log(4 / 3), 0.75 * math.log(3) - math.log(2)


def from_logits(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, divergence: DivergenceConfig = FULL
) -> DivergenceResult:
    """The divergence of logits given as hidden states, with a unit matrix for the output layers; no id is dead."""
    num_positions, vocab_size = student_NV.shape
    return divergence_loss(
        student_NV,
        torch.eye(vocab_size, dtype=student_NV.dtype),
        teacher_NV,
        torch.eye(vocab_size, dtype=student_NV.dtype),
        loss_weights_N=torch.ones(num_positions),
        target_ids_N=torch.zeros(num_positions, dtype=torch.int64),
        settings=divergence,
        shard=VocabularyShard(0, vocab_size, vocab_size, vocab_size, group=None),
    )


def two_logits(num_positions: int, vocab_size: int) -> st.SearchStrategy:
    numbers = st.lists(st.floats(-30, 30), min_size=vocab_size, max_size=vocab_size)
    rows = st.lists(numbers, min_size=num_positions, max_size=num_positions)
    return rows.map(lambda values: torch.tensor(values, dtype=torch.float64))


def true_divergences() -> st.SearchStrategy:
    """Any kind over the whole vocabulary, renormalised or with a bucket; not the un-normalised sum."""
    tails = st.sampled_from([{}, *({"top_k": k, "top_k_tail": tail} for k in (1, 2, 4) for tail in TAILS)])
    return st.builds(lambda kind, tail: DivergenceConfig(chunk_size=2, **kind, **tail), st.sampled_from(KINDS), tails)


@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_match_the_plain_formula(dtype, tolerance, chunk_size, case):
    divergence = DivergenceConfig(chunk_size=chunk_size, **case)
    actual = with_gradients(random_inputs(dtype), divergence, WHOLE)
    assert_same(actual, plain_divergence(random_inputs(dtype), divergence), tolerance)


def test_bfloat16_parameters_give_float32_figures_and_bfloat16_gradients():
    actual = with_gradients(random_inputs(torch.bfloat16), FULL, WHOLE)
    assert actual["loss"].dtype == actual["divergence_N"].dtype == torch.float32
    assert actual["hidden_gradient"].dtype == actual["weight_gradient"].dtype == torch.bfloat16
    expected = plain_divergence(random_inputs(torch.bfloat16), FULL)
    torch.testing.assert_close(actual["loss"].double(), expected["loss"], rtol=2e-2, atol=0)
    for name in ("hidden_gradient", "weight_gradient"):
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({"kind": "forward_kl"}, FORWARD),
        ({"kind": "reverse_kl"}, REVERSE),
        ({"kind": "mixture", "reverse_weight": 0.25}, 0.75 * FORWARD + 0.25 * REVERSE),
        ({"kind": "mixture", "reverse_weight": 0.0}, FORWARD),
        ({"kind": "mixture", "reverse_weight": 1.0}, REVERSE),
        # m = (3/8, 5/8)
        ({"kind": "jsd"}, 0.25 * math.log(16 / 15) + 0.125 * math.log(2 / 3) + 0.375 * math.log(6 / 5)),
    ],
    ids=str,
)
def test_the_divergence_of_two_coins_is_the_textbook_value(case, expected):
    assert from_logits(BENT_COIN, FAIR_COIN, DivergenceConfig(**case)).loss.item() == pytest.approx(expected, abs=1e-7)


def test_top_1_takes_the_lower_id_of_two_equal_teacher_logits():
    top_1 = DivergenceConfig(top_k=1)
    assert from_logits(BENT_COIN, FAIR_COIN, top_1).loss.item() == pytest.approx(0.5 * math.log(2), abs=1e-7)


@settings(deadline=None, max_examples=100)
@given(student_NV=two_logits(3, 4), teacher_NV=two_logits(3, 4), divergence=true_divergences())
def test_a_true_divergence_is_never_negative_and_has_the_slow_value_and_gradient(student_NV, teacher_NV, divergence):
    fast, slow = student_NV.clone().requires_grad_(), student_NV.clone().requires_grad_()
    result = from_logits(fast, teacher_NV, divergence)
    result.loss.backward()
    assert (result.divergence_N >= -1e-12).all()
    expected_N = torch.stack([divergence_slowly(s, t, divergence) for s, t in zip(slow, teacher_NV, strict=True)])
    expected_N.sum().backward()
    torch.testing.assert_close(result.divergence_N, expected_N.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(logits_NV=two_logits(3, 4), divergence=true_divergences())
def test_equal_logits_have_no_divergence_and_no_gradient(logits_NV, divergence):
    student_NV = logits_NV.clone().requires_grad_()
    result = from_logits(student_NV, logits_NV, divergence)
    result.loss.backward()
    assert result.divergence_N.abs().max() < 1e-15
    assert result.agrees_N.all()
    assert student_NV.grad.abs().max() < 1e-15


@settings(deadline=None, max_examples=25)
@given(logits_NV=two_logits(3, 4), top_k=st.integers(1, 4))
def test_the_sum_of_equal_logits_that_is_not_normalised_is_zero(logits_NV, top_k):
    assert from_logits(logits_NV, logits_NV, DivergenceConfig(top_k=top_k)).divergence_N.abs().max() == 0


@settings(deadline=None, max_examples=50)
@given(one_NV=two_logits(3, 4), other_NV=two_logits(3, 4), alpha=st.floats(0.01, 0.99))
def test_jsd_is_the_same_both_ways_with_the_opposite_weight_and_at_most_log_2(one_NV, other_NV, alpha):
    there = from_logits(one_NV, other_NV, DivergenceConfig(kind="jsd", jsd_alpha=alpha)).divergence_N
    back = from_logits(other_NV, one_NV, DivergenceConfig(kind="jsd", jsd_alpha=1 - alpha)).divergence_N
    torch.testing.assert_close(there, back, rtol=1e-10, atol=1e-12)
    half = DivergenceConfig(kind="jsd")
    there, back = (from_logits(*both, half).divergence_N for both in ((one_NV, other_NV), (other_NV, one_NV)))
    torch.testing.assert_close(there, back, rtol=1e-10, atol=1e-12)
    assert there.max() <= math.log(2) + 1e-12


@pytest.mark.parametrize("kind", KINDS, ids=label)
@pytest.mark.parametrize("tail", TAILS)
def test_all_tokens_chosen_are_the_full_divergence(kind, tail):
    full = with_gradients(random_inputs(), DivergenceConfig(**kind), WHOLE)
    every = with_gradients(random_inputs(), DivergenceConfig(top_k=NUM_ROWS, top_k_tail=tail, **kind), WHOLE)
    assert_same(every, full, 1e-12)


@settings(deadline=None, max_examples=25)
@given(
    student_NV=two_logits(3, 4),
    teacher_NV=two_logits(3, 4),
    constant=st.floats(-100, 100),
    divergence=true_divergences(),
)
def test_a_constant_added_to_the_logits_changes_nothing(student_NV, teacher_NV, constant, divergence):
    # adding may make almost equal logits equal, and then others are the k most likely
    assume(not divergence.top_k or teacher_NV.sort(-1).values.diff(dim=-1).min() > 1e-9)
    plain = from_logits(student_NV, teacher_NV, divergence)
    shifted = from_logits(student_NV + constant, teacher_NV - constant, divergence)
    torch.testing.assert_close(shifted.divergence_N, plain.divergence_N, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=50)
@given(
    logits=st.lists(st.sampled_from([-math.inf, 0.0, 1.0, 2.0]), min_size=7, max_size=7),
    k=st.integers(1, 9),
)
def test_top_k_is_the_stable_descending_sort(logits, k):
    ids = global_top_k(torch.tensor([logits]), k, VocabularyShard(0, 7, 7, 7, group=None))
    assert ids[0].tolist() == sorted(range(7), key=lambda i: (-logits[i], i))[:k]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_padding_and_mask_token_take_no_part(case):
    divergence = DivergenceConfig(chunk_size=4, **case)
    plain = with_gradients(random_inputs(), divergence, WHOLE)
    dead_ids = [MASK_TOKEN_ID, 13, 14, 15]
    assert (plain["weight_gradient"][dead_ids] == 0).all()
    changed = random_inputs()
    for name in ("student_weight_VH", "teacher_weight_VH"):
        changed[name].data[dead_ids] = 7.0
    assert_same(with_gradients(changed, divergence, WHOLE), plain, 0.0)


def with_impossible_tokens(**case) -> tuple[DivergenceResult, torch.Tensor]:
    """Neither model gives token 2 anything, the teacher nothing to token 3 either; and the weight's gradient."""
    student_weight_VH = torch.tensor([[0.0], [0.0], [-torch.inf], [5.0]]).requires_grad_()
    result = divergence_loss(
        torch.ones(1, 1, requires_grad=True),
        student_weight_VH,
        torch.ones(1, 1),
        torch.tensor([[0.0], [0.0], [-torch.inf], [-torch.inf]]),
        loss_weights_N=torch.ones(1),
        target_ids_N=torch.tensor([3]),
        settings=DivergenceConfig(**case),
        shard=VocabularyShard(0, 4, 4, 4, group=None),
    )
    result.loss.backward()
    return result, student_weight_VH.grad


@pytest.mark.parametrize("top_k", [0, 2, 4])
def test_tokens_the_teacher_rules_out_add_nothing_to_forward_kl(top_k):
    result, gradient_VH = with_impossible_tokens(top_k=top_k)
    assert result.loss.item() == pytest.approx(math.log(2 + math.exp(5)) - math.log(2), rel=1e-6)
    assert gradient_VH.isfinite().all()


def test_jsd_of_tokens_the_teacher_rules_out_is_what_the_definition_gives():
    result, gradient_VH = with_impossible_tokens(kind="jsd", jsd_alpha=0.25)
    q, rest = 1 / (2 + math.exp(5)), math.exp(5) / (2 + math.exp(5))
    m = 0.25 * 0.5 + 0.75 * q
    expected = 0.25 * math.log(0.5 / m) + 0.75 * (2 * q * math.log(q / m) + rest * math.log(1 / 0.75))
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    assert gradient_VH.isfinite().all()


@pytest.mark.parametrize("kind", KINDS, ids=label)
@pytest.mark.parametrize(
    "restriction", [{}, *({"top_k": k, "top_k_tail": t} for k in (1, 2, 3, 4) for t in TAILS)], ids=str
)
def test_everything_is_finite_where_a_model_gives_no_probability(kind, restriction):
    result, gradient_VH = with_impossible_tokens(**kind, **restriction)
    for field in dataclasses.fields(result):
        assert getattr(result, field.name).isfinite().all(), field.name
    assert gradient_VH.isfinite().all()
    assert result.loss.item() >= -1e-6


@pytest.mark.parametrize("divergence", [FULL, TOP_3], ids=["full", "top 3"])
def test_no_positions_give_a_zero_loss_with_zero_gradients(divergence):
    inputs = {name: value if "weight_VH" in name else value[:0] for name, value in random_inputs().items()}
    inputs["student_hidden_NH"].retain_grad()
    actual = with_gradients(inputs, divergence, WHOLE)
    assert actual["loss"] == 0
    assert actual["divergence_N"].shape == (0,)
    assert actual["hidden_gradient"].shape == (0, 5)
    assert (actual["weight_gradient"] == 0).all()


def test_gradients_follow_a_loss_that_is_scaled_in_place():
    inputs, plain = random_inputs(), with_gradients(random_inputs(), FULL, WHOLE)
    loss = divergence_loss(**inputs, settings=FULL, shard=WHOLE).loss
    loss *= 3
    (loss / 6).backward()
    torch.testing.assert_close(inputs["student_hidden_NH"].grad, plain["hidden_gradient"] / 2)
    torch.testing.assert_close(inputs["student_weight_VH"].grad, plain["weight_gradient"] / 2)


def test_a_frozen_output_layer_gets_no_gradient():
    inputs = random_inputs()
    inputs["student_weight_VH"].requires_grad_(False)
    actual = with_gradients(inputs, FULL, WHOLE)
    assert actual["weight_gradient"] is None
    expected = plain_divergence(random_inputs(), FULL)
    torch.testing.assert_close(actual["hidden_gradient"], expected["hidden_gradient"], rtol=0, atol=1e-12)


def test_without_autograd_the_loss_is_the_same():
    with torch.no_grad():
        result = divergence_loss(**random_inputs(), settings=FULL, shard=WHOLE)
    assert not result.loss.requires_grad
    assert result.loss.item() == pytest.approx(plain_divergence(random_inputs(), FULL)["loss"].item(), rel=1e-12)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_no_tensor_holds_the_logits_of_all_positions(case):
    class LargestOutput(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            self.numel = max(self.numel, getattr(output, "numel", int)())
            return output

    with LargestOutput() as seen:
        with_gradients(random_inputs(), DivergenceConfig(chunk_size=2, **case), WHOLE)
    assert seen.numel < NUM_POSITIONS * NUM_ROWS
