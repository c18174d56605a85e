"""The chunked cross-entropy on one rank, against PyTorch's own in float64 with autograd."""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.distillation.cross_entropy import cross_entropy_loss
from tests.slow_divergences import LIVE_IDS, NUM_POSITIONS, WHOLE, assert_same, random_inputs


def random_student(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Arguments of `cross_entropy_loss`; the same values on every call, rounded to `dtype`."""
    inputs = random_inputs(dtype)
    names = {"hidden_NH": "student_hidden_NH", "weight_VH": "student_weight_VH"}
    same = {name: inputs[name] for name in ("loss_weights_N", "target_ids_N")}
    return {name: inputs[source] for name, source in names.items()} | same


def plain_cross_entropy(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same in float64: all logits at once, dead ids left out."""
    x = {name: value.detach().double() if value.is_floating_point() else value for name, value in inputs.items()}
    hidden, weight = x["hidden_NH"].requires_grad_(), x["weight_VH"].requires_grad_()
    logits_NV = hidden @ weight[LIVE_IDS].T
    targets_N = torch.tensor([LIVE_IDS.index(i) for i in x["target_ids_N"].tolist()])
    costs_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    loss = (x["loss_weights_N"] * costs_N).sum()
    loss.backward()
    return {
        "loss": loss.detach(),
        "log_prob_N": -costs_N.detach(),
        "is_likeliest_N": logits_NV.argmax(-1) == targets_N,
        "hidden_gradient": hidden.grad,
        "weight_gradient": weight.grad,
    }


def with_gradients(inputs: dict[str, torch.Tensor], **settings: object) -> dict[str, torch.Tensor]:
    """What `cross_entropy_loss` and its backward pass give, under the names of `plain_cross_entropy`."""
    result = cross_entropy_loss(**inputs, **settings)
    result.loss.backward()
    gradients = {"hidden_gradient": inputs["hidden_NH"].grad, "weight_gradient": inputs["weight_VH"].grad}
    return {name: value.detach() for name, value in vars(result).items()} | gradients


@pytest.mark.parametrize("chunk_size", [1, 7, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_match_the_plain_formula(dtype, tolerance, chunk_size):
    actual = with_gradients(random_student(dtype), shard=WHOLE, chunk_size=chunk_size)
    assert_same(actual, plain_cross_entropy(random_student(dtype)), tolerance)


def test_without_gradients_the_log_probabilities_are_the_same():
    with torch.no_grad():
        result = cross_entropy_loss(**random_student(), shard=WHOLE, chunk_size=4)
    assert not result.loss.requires_grad
    assert_same({"x": result.log_prob_N}, {"x": plain_cross_entropy(random_student())["log_prob_N"]}, 1e-12)


def test_a_certain_token_costs_nothing_and_an_impossible_one_a_finite_sum():
    logits_NV = torch.tensor([[1e4, 0.0, 0.0], [1e4, 0.0, 0.0]]).requires_grad_()
    shard = type(WHOLE)(0, 3, 3, 3, group=None)
    result = cross_entropy_loss(
        logits_NV,
        torch.eye(3),
        loss_weights_N=torch.ones(2),
        target_ids_N=torch.tensor([0, 1]),
        shard=shard,
        chunk_size=2,
    )
    result.loss.backward()
    assert result.log_prob_N.tolist() == [0.0, -1e4] and result.is_likeliest_N.tolist() == [True, False]
    assert logits_NV.grad.tolist() == [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]]


def test_no_positions_cost_nothing():
    inputs = random_student()
    nothing = {name: value if name == "weight_VH" else value[:0] for name, value in inputs.items()}
    assert cross_entropy_loss(**nothing, shard=WHOLE, chunk_size=4).loss.item() == 0.0
    assert NUM_POSITIONS > 0
