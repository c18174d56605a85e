"""The divergences written down from their textbook formulas: all logits at once, in float64, gradients by autograd.

They share nothing with the package but the names of the settings. Tests give both the same arguments:

    with_gradients(random_inputs(), settings, WHOLE)         # what the package makes of them
    plain_divergence(random_inputs(), settings)              # what it must be

Shapes: N positions, V vocabulary rows, H hidden size.
"""

from __future__ import annotations

import torch

from megatron_opdlm.config.schema import DivergenceConfig
from megatron_opdlm.distillation.chunked_loss import divergence_loss
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard

NUM_POSITIONS, NUM_ROWS, VOCAB_SIZE, MASK_TOKEN_ID = 9, 16, 13, 10
WHOLE = VocabularyShard(0, NUM_ROWS, VOCAB_SIZE, MASK_TOKEN_ID, group=None)
LIVE_IDS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12]
KINDS = [
    {"kind": "forward_kl"},
    {"kind": "reverse_kl"},
    {"kind": "mixture", "reverse_weight": 0.3},
    {"kind": "jsd"},
    {"kind": "jsd", "jsd_alpha": 0.2},
]
CASES = [
    *KINDS,
    *({"kind": "forward_kl", "top_k": top_k} for top_k in (1, 3, NUM_ROWS)),
    *(kind | {"top_k": 3, "top_k_tail": tail} for kind in KINDS for tail in ("renormalize", "bucket")),
    *(kind | {"top_k": NUM_ROWS, "top_k_tail": tail} for kind in KINDS for tail in ("renormalize", "bucket")),
    {"kind": "forward_kl", "top_k": 1, "top_k_tail": "renormalize"},
    {"kind": "reverse_kl", "teacher_temperature": 2.0},
    {"kind": "forward_kl", "teacher_top_k": 4},
    {"kind": "forward_kl", "teacher_top_p": 0.7},
    {"kind": "forward_kl", "teacher_min_p": 0.2},
    {"kind": "jsd", "teacher_temperature": 1.5, "teacher_top_k": 6, "teacher_top_p": 0.9, "teacher_min_p": 0.1},
    {"kind": "jsd", "teacher_top_k": 3, "top_k": 5, "top_k_tail": "bucket"},
    {"kind": "forward_kl", "teacher_temperature": 0.5, "teacher_top_p": 0.8, "top_k": 4, "top_k_tail": "renormalize"},
    {"kind": "forward_kl", "teacher_top_k": 2, "top_k": 4},
]
"""Fields of DivergenceConfig: every kind, over all tokens and restricted in every way, and every filter."""


def random_inputs(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Arguments of `divergence_loss` with different hidden sizes; the same values on every call, rounded to `dtype`."""
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


def with_gradients(
    inputs: dict[str, torch.Tensor], settings: DivergenceConfig, shard: VocabularyShard
) -> dict[str, torch.Tensor]:
    """What `divergence_loss` and its backward pass give, under the names of `plain_divergence`."""
    result = divergence_loss(**inputs, settings=settings, shard=shard)
    result.loss.backward()
    fields = {name: value.detach() for name, value in vars(result).items()}
    gradients = {
        "hidden_gradient": inputs["student_hidden_NH"].grad,
        "weight_gradient": inputs["student_weight_VH"].grad,
    }
    return fields | gradients


def plain_divergence(inputs: dict[str, torch.Tensor], settings: DivergenceConfig) -> dict[str, torch.Tensor]:
    """The same loss and its gradients in float64, ids that take no part left out from the start."""
    x = {name: value.detach().double() if value.is_floating_point() else value for name, value in inputs.items()}
    hidden, weight = x["student_hidden_NH"].requires_grad_(), x["student_weight_VH"].requires_grad_()
    student_NV = hidden @ weight[LIVE_IDS].T
    teacher_NV = x["teacher_hidden_NH"] @ x["teacher_weight_VH"][LIVE_IDS].T
    rows = [divergence_slowly(s_V, t_V, settings) for s_V, t_V in zip(student_NV, teacher_NV, strict=True)]
    divergence_N = torch.stack(rows)
    loss = (x["loss_weights_N"] * divergence_N).sum()
    loss.backward()
    target_columns_N = torch.tensor([LIVE_IDS.index(i) for i in x["target_ids_N"].tolist()])
    return {
        "loss": loss.detach(),
        "divergence_N": divergence_N.detach(),
        "student_log_prob_N": student_NV.detach().log_softmax(-1)[torch.arange(NUM_POSITIONS), target_columns_N],
        "student_entropy_N": torch.distributions.Categorical(logits=student_NV.detach()).entropy(),
        "agrees_N": student_NV.argmax(-1) == teacher_NV.argmax(-1),
        "hidden_gradient": hidden.grad,
        "weight_gradient": weight.grad,
    }


def divergence_slowly(student_V: torch.Tensor, teacher_V: torch.Tensor, settings: DivergenceConfig) -> torch.Tensor:
    """The divergence of two float64 logits, differentiable in the first."""
    p, q = torch.tensor(target_slowly(teacher_V.tolist(), settings), dtype=torch.float64), student_V.softmax(0)
    if settings.top_k:
        order = sorted(range(len(teacher_V)), key=lambda token: (-teacher_V[token], token))
        chosen, others = order[: settings.top_k], order[settings.top_k :]
        if settings.top_k_tail == "bucket" and others:
            p, q = (torch.cat([x[chosen], x[others].sum()[None]]) for x in (p, q))
        else:
            p, q = p[chosen], q[chosen]
        if settings.top_k_tail == "renormalize":
            p, q = p / p.sum(), q / q.sum()
    if settings.kind == "forward_kl":
        return kl_slowly(p, q)
    if settings.kind == "reverse_kl":
        return kl_slowly(q, p)
    if settings.kind == "mixture":
        weight = settings.reverse_weight
        return (1 - weight) * kl_slowly(p, q) + weight * kl_slowly(q, p)
    alpha = settings.jsd_alpha
    m = alpha * p + (1 - alpha) * q
    return alpha * kl_slowly(p, m) + (1 - alpha) * kl_slowly(q, m)


def kl_slowly(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """sum of * log(of / to), where zero times anything is zero."""
    return (torch.special.xlogy(of, of) - of * to.log()).sum()


def target_slowly(logits: list[float], settings: DivergenceConfig) -> list[float]:
    """The teacher's target distribution: temperature, top-k, top-p, min-p, one token after the other."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    tempered = torch.tensor(logits, dtype=torch.float64) / settings.teacher_temperature
    probabilities = tempered.softmax(0).tolist()
    kept = order[: settings.teacher_top_k or None]
    whole, mass, nucleus = sum(probabilities[token] for token in kept), 0.0, []
    for token in kept:
        if settings.teacher_top_p < 1 and mass >= settings.teacher_top_p * whole:
            break
        nucleus.append(token)
        mass += probabilities[token]
    kept = [token for token in nucleus if probabilities[token] >= settings.teacher_min_p * probabilities[order[0]]]
    total = sum(probabilities[token] for token in kept)
    return [probabilities[token] / total if token in kept else 0.0 for token in range(len(logits))]


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every figure within `tolerance`, relative to the largest one of its kind."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.double().abs().max().item()
        torch.testing.assert_close(actual[name].to(value.dtype), value, rtol=0, atol=tolerance * max(largest, 1.0))


def label(case: dict[str, object]) -> str:
    """A case as the name of a test."""
    return " ".join(str(case["kind"]) if name == "kind" else f"{name}={value}" for name, value in case.items())
