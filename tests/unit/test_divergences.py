"""The chunked divergence on one rank, against the plainly written formula in float64 with autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_opdlm.distillation.divergences import DivergenceResult, forward_kl_loss
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard, global_top_k

NUM_POSITIONS, NUM_ROWS, VOCAB_SIZE, MASK_TOKEN_ID = 9, 16, 13, 10
WHOLE = VocabularyShard(0, NUM_ROWS, VOCAB_SIZE, MASK_TOKEN_ID, group=None)
LIVE_IDS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12]
TOP_KS = [0, 1, 3, NUM_ROWS]


def random_inputs(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Arguments of `forward_kl_loss` with different hidden sizes; the same values on every call, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {
        "student_hidden_NH": draw(NUM_POSITIONS, 5).requires_grad_(),
        "student_weight_VH": draw(NUM_ROWS, 5).requires_grad_(),
        "teacher_hidden_NH": draw(NUM_POSITIONS, 6),
        "teacher_weight_VH": draw(NUM_ROWS, 6),
        "loss_weights_N": torch.rand(NUM_POSITIONS, generator=generator),
        "target_ids_N": torch.tensor([LIVE_IDS[n % len(LIVE_IDS)] for n in range(3, 3 + NUM_POSITIONS)]),
    }
    return inputs


def plain_forward_kl(inputs: dict[str, torch.Tensor], top_k: int) -> dict[str, torch.Tensor]:
    """The same loss and its gradients in float64: all logits at once, dead ids left out, gradients by autograd."""
    x = {name: value.detach().double() if value.is_floating_point() else value for name, value in inputs.items()}
    hidden, weight = x["student_hidden_NH"].requires_grad_(), x["student_weight_VH"].requires_grad_()
    student_NV = torch.log_softmax(hidden @ weight[LIVE_IDS].T, dim=-1)
    teacher_NV = torch.log_softmax(x["teacher_hidden_NH"] @ x["teacher_weight_VH"][LIVE_IDS].T, dim=-1)
    terms_NV = teacher_NV.exp() * (teacher_NV - student_NV)
    if top_k:
        terms_NV = terms_NV.gather(1, teacher_NV.argsort(descending=True, stable=True)[:, :top_k])
    divergence_N = terms_NV.sum(-1)
    loss = (x["loss_weights_N"] * divergence_N).sum()
    loss.backward()
    target_columns_N = torch.tensor([LIVE_IDS.index(i) for i in x["target_ids_N"].tolist()])
    return {
        "loss": loss.detach(),
        "divergence_N": divergence_N.detach(),
        "student_log_prob_N": student_NV.detach()[torch.arange(NUM_POSITIONS), target_columns_N],
        "student_entropy_N": torch.distributions.Categorical(logits=student_NV.detach()).entropy(),
        "agrees_N": student_NV.argmax(-1) == teacher_NV.argmax(-1),
        "hidden_gradient": hidden.grad,
        "weight_gradient": weight.grad,
    }


def with_gradients(inputs: dict[str, torch.Tensor], **settings: object) -> dict[str, torch.Tensor]:
    """What `forward_kl_loss` and its backward pass give, under the names of `plain_forward_kl`."""
    result = forward_kl_loss(**inputs, **settings)
    result.loss.backward()
    fields = {name: value.detach() for name, value in vars(result).items()}
    gradients = {
        "hidden_gradient": inputs["student_hidden_NH"].grad,
        "weight_gradient": inputs["student_weight_VH"].grad,
    }
    return fields | gradients


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every figure within `tolerance`, relative to the largest one of its kind."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.double().abs().max().item()
        torch.testing.assert_close(actual[name].to(value.dtype), value, rtol=0, atol=tolerance * max(largest, 1.0))


def from_logits(student_NV: torch.Tensor, teacher_NV: torch.Tensor, top_k: int = 0) -> DivergenceResult:
    """The divergence of logits given as hidden states, with a unit matrix for the output layers; no id is dead."""
    num_positions, vocab_size = student_NV.shape
    return forward_kl_loss(
        student_NV,
        torch.eye(vocab_size, dtype=student_NV.dtype),
        teacher_NV,
        torch.eye(vocab_size, dtype=student_NV.dtype),
        loss_weights_N=torch.ones(num_positions),
        target_ids_N=torch.zeros(num_positions, dtype=torch.int64),
        shard=VocabularyShard(0, vocab_size, vocab_size, vocab_size, group=None),
        chunk_size=2,
        top_k=top_k,
    )


def two_logits(num_positions: int, vocab_size: int) -> st.SearchStrategy:
    numbers = st.lists(st.floats(-30, 30), min_size=vocab_size, max_size=vocab_size)
    rows = st.lists(numbers, min_size=num_positions, max_size=num_positions)
    return rows.map(lambda values: torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_match_the_plain_formula(dtype, tolerance, chunk_size, top_k):
    actual = with_gradients(random_inputs(dtype), shard=WHOLE, chunk_size=chunk_size, top_k=top_k)
    assert_same(actual, plain_forward_kl(random_inputs(dtype), top_k), tolerance)


def test_bfloat16_parameters_give_float32_figures_and_bfloat16_gradients():
    actual = with_gradients(random_inputs(torch.bfloat16), shard=WHOLE, chunk_size=4)
    assert actual["loss"].dtype == actual["divergence_N"].dtype == torch.float32
    assert actual["hidden_gradient"].dtype == actual["weight_gradient"].dtype == torch.bfloat16
    expected = plain_forward_kl(random_inputs(torch.bfloat16), 0)
    torch.testing.assert_close(actual["loss"].double(), expected["loss"], rtol=2e-2, atol=0)
    for name in ("hidden_gradient", "weight_gradient"):
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=0, atol=2e-2)


def test_the_divergence_of_two_coins_is_the_textbook_value():
    student, teacher = torch.tensor([[0.25, 0.75]]).log().double(), torch.tensor([[0.5, 0.5]]).log().double()
    assert from_logits(student, teacher).loss.item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-7)


def test_top_1_takes_the_lower_id_of_two_equal_teacher_logits():
    student, teacher = torch.tensor([[0.25, 0.75]]).log().double(), torch.tensor([[0.5, 0.5]]).log().double()
    assert from_logits(student, teacher, top_k=1).loss.item() == pytest.approx(0.5 * math.log(2), abs=1e-7)


@settings(deadline=None, max_examples=50)
@given(student_NV=two_logits(3, 4), teacher_NV=two_logits(3, 4))
def test_full_divergence_is_never_negative(student_NV, teacher_NV):
    assert (from_logits(student_NV, teacher_NV).divergence_N >= -1e-12).all()


@settings(deadline=None, max_examples=25)
@given(logits_NV=two_logits(3, 4), top_k=st.integers(0, 4))
def test_equal_logits_have_no_divergence_and_no_gradient(logits_NV, top_k):
    student_NV = logits_NV.clone().requires_grad_()
    result = from_logits(student_NV, logits_NV, top_k)
    result.loss.backward()
    assert result.divergence_N.abs().max() == 0
    assert result.agrees_N.all()
    # q * sum_A p - p [in A] is zero for q = p only where A holds all tokens.
    if top_k in (0, 4):
        assert student_NV.grad.abs().max() < 1e-15


@settings(deadline=None, max_examples=25)
@given(student_NV=two_logits(3, 4), teacher_NV=two_logits(3, 4), constant=st.floats(-100, 100))
def test_a_constant_added_to_the_logits_changes_nothing(student_NV, teacher_NV, constant):
    plain, shifted = from_logits(student_NV, teacher_NV), from_logits(student_NV + constant, teacher_NV - constant)
    torch.testing.assert_close(shifted.divergence_N, plain.divergence_N, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=50)
@given(
    logits=st.lists(st.sampled_from([-math.inf, 0.0, 1.0, 2.0]), min_size=7, max_size=7),
    k=st.integers(1, 9),
)
def test_top_k_is_the_stable_descending_sort(logits, k):
    ids = global_top_k(torch.tensor([logits]), k, VocabularyShard(0, 7, 7, 7, group=None))
    assert ids[0].tolist() == sorted(range(7), key=lambda i: (-logits[i], i))[:k]


@pytest.mark.parametrize("top_k", [0, 3])
def test_padding_and_mask_token_take_no_part(top_k):
    plain = with_gradients(random_inputs(), shard=WHOLE, chunk_size=4, top_k=top_k)
    dead_ids = [MASK_TOKEN_ID, 13, 14, 15]
    assert (plain["weight_gradient"][dead_ids] == 0).all()
    changed = random_inputs()
    for name in ("student_weight_VH", "teacher_weight_VH"):
        changed[name].data[dead_ids] = 7.0
    assert_same(with_gradients(changed, shard=WHOLE, chunk_size=4, top_k=top_k), plain, 0.0)


@pytest.mark.parametrize("top_k", [0, 2, 4])
def test_tokens_the_teacher_rules_out_contribute_nothing(top_k):
    student_weight_VH = torch.tensor([[0.0], [0.0], [-torch.inf], [5.0]])
    result = forward_kl_loss(
        torch.ones(1, 1, requires_grad=True),
        student_weight_VH.requires_grad_(),
        torch.ones(1, 1),
        torch.tensor([[0.0], [0.0], [-torch.inf], [-torch.inf]]),
        loss_weights_N=torch.ones(1),
        target_ids_N=torch.tensor([3]),
        shard=VocabularyShard(0, 4, 4, 4, group=None),
        chunk_size=1,
        top_k=top_k,
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(math.log(2 + math.exp(5)) - math.log(2), rel=1e-6)
    assert student_weight_VH.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [0, 3])
def test_no_positions_give_a_zero_loss_with_zero_gradients(top_k):
    inputs = {name: value if "weight_VH" in name else value[:0] for name, value in random_inputs().items()}
    inputs["student_hidden_NH"].retain_grad()
    actual = with_gradients(inputs, shard=WHOLE, chunk_size=4, top_k=top_k)
    assert actual["loss"] == 0
    assert actual["divergence_N"].shape == (0,)
    assert actual["hidden_gradient"].shape == (0, 5)
    assert (actual["weight_gradient"] == 0).all()


def test_gradients_follow_a_loss_that_is_scaled_in_place():
    inputs, plain = random_inputs(), with_gradients(random_inputs(), shard=WHOLE, chunk_size=4)
    loss = forward_kl_loss(**inputs, shard=WHOLE, chunk_size=4).loss
    loss *= 3
    (loss / 6).backward()
    torch.testing.assert_close(inputs["student_hidden_NH"].grad, plain["hidden_gradient"] / 2)
    torch.testing.assert_close(inputs["student_weight_VH"].grad, plain["weight_gradient"] / 2)


def test_a_frozen_output_layer_gets_no_gradient():
    inputs = random_inputs()
    inputs["student_weight_VH"].requires_grad_(False)
    actual = with_gradients(inputs, shard=WHOLE, chunk_size=4)
    assert actual["weight_gradient"] is None
    expected = plain_forward_kl(random_inputs(), 0)
    torch.testing.assert_close(actual["hidden_gradient"], expected["hidden_gradient"], rtol=0, atol=1e-12)


def test_without_autograd_the_loss_is_the_same():
    with torch.no_grad():
        result = forward_kl_loss(**random_inputs(), shard=WHOLE, chunk_size=4)
    assert not result.loss.requires_grad
    assert result.loss.item() == pytest.approx(plain_forward_kl(random_inputs(), 0)["loss"].item(), rel=1e-12)


def test_no_tensor_holds_the_logits_of_all_positions():
    class LargestOutput(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            self.numel = max(self.numel, getattr(output, "numel", int)())
            return output

    with LargestOutput() as seen:
        with_gradients(random_inputs(), shard=WHOLE, chunk_size=2, top_k=3)
    assert seen.numel < NUM_POSITIONS * NUM_ROWS


@pytest.mark.parametrize(("setting", "value"), [("chunk_size", 0), ("top_k", -1)])
def test_senseless_settings_are_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=rf"divergence\.{setting} \({value}\)"):
        forward_kl_loss(**random_inputs(), shard=WHOLE, **({"chunk_size": 4} | {setting: value}))
