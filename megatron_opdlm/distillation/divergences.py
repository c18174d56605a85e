"""What each divergence between teacher and student is: its value, and all that its gradient needs.

A divergence is a sum over outcomes, D = sum_v f(p_v, q_v), with p of the teacher and q of the student. Where q is the
softmax of logits s, the chain rule is the same for each of them. With the slopes h_v = q_v df/dq_v,

    dD/ds_v = h_v - q_v * sum_u h_u,

and a multiple of q_v may be left out of h_v, since the q_v sum up to one. So a divergence is one function from
log-probabilities to a value and slopes, and a row in `DIVERGENCES`. Both are sums over outcomes, and outcomes may lie
on several ranks, or be a part of the vocabulary with a last one for all that is left (`logit_gradients`).

    divergence_C, slopes_CO = divergence_and_slopes(log_p_CO, log_q_CO, DivergenceConfig(kind="jsd"))

| kind | D | h_v |
| --- | --- | --- |
| forward_kl | sum p_v log(p_v / q_v) | -p_v |
| reverse_kl | sum q_v log(q_v / p_v) | q_v log(q_v / p_v) |
| mixture | (1 - w) forward + w reverse | (1 - w) h_v of forward + w h_v of reverse |
| jsd | a sum p_v log(p_v / m_v) + (1 - a) sum q_v log(q_v / m_v), m = a p + (1 - a) q | (1 - a) q_v log(q_v / m_v) |

with w of `divergence.reverse_weight` and a of `divergence.jsd_alpha`. At a = 0.5 the Jensen-Shannon divergence is
symmetric and at most log 2. In dJSD/dq_v the mixture's own change adds -(1 - a) (a p_v + (1 - a) q_v) / m_v, which is a
constant, so only the logarithm is left.

A token without any probability has about `LOWEST` for its log-probability, so that every product is finite.

Shapes: C positions, O outcomes on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megatron_opdlm.config.method import DivergenceKind
from megatron_opdlm.config.schema import DivergenceConfig

LOWEST = -1e4
"""About the log-probability that a token without any probability counts with. Its exponential is zero in float64 too,
so under its own distribution it adds nothing to a sum; under the other it costs 10,000 nats, not infinitely many."""

Divergence = Callable[[torch.Tensor, torch.Tensor, DivergenceConfig], tuple[torch.Tensor, torch.Tensor]]


def divergence_and_slopes(
    log_p_CO: torch.Tensor, log_q_CO: torch.Tensor, settings: DivergenceConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The terms summed up over these outcomes [C], and the slopes [C, O], which take the memory of `log_p_CO`.

    Log-probabilities are finite. Beside the two arguments it uses the memory of one tensor of their
    shape, of two for `mixture` and `jsd`. Communicates nothing: what lies on other ranks is the caller's to add.
    """
    return DIVERGENCES[settings.kind](log_p_CO, log_q_CO, settings)


def _forward_kl(log_p_CO, log_q_CO, settings: DivergenceConfig) -> tuple[torch.Tensor, torch.Tensor]:
    p_CO = log_p_CO.exp()
    forward_C = log_p_CO.sub_(log_q_CO).mul_(p_CO).sum(-1)
    return forward_C, torch.neg(p_CO, out=log_p_CO)


def _reverse_kl(log_p_CO, log_q_CO, settings: DivergenceConfig) -> tuple[torch.Tensor, torch.Tensor]:
    slopes_CO = log_p_CO.neg_().add_(log_q_CO).mul_(log_q_CO.exp())
    return slopes_CO.sum(-1), slopes_CO


def _mixture(log_p_CO, log_q_CO, settings: DivergenceConfig) -> tuple[torch.Tensor, torch.Tensor]:
    weight = settings.reverse_weight
    p_CO = log_p_CO.exp()
    log_ratio_CO = log_p_CO.sub_(log_q_CO)
    forward_C = (log_ratio_CO * p_CO).sum(-1)
    reverse_CO = log_ratio_CO.mul_(log_q_CO.exp()).neg_()
    reverse_C = reverse_CO.sum(-1)
    return (1 - weight) * forward_C + weight * reverse_C, reverse_CO.mul_(weight).sub_(p_CO, alpha=1 - weight)


def _jsd(log_p_CO, log_q_CO, settings: DivergenceConfig) -> tuple[torch.Tensor, torch.Tensor]:
    alpha = settings.jsd_alpha
    p_CO = log_p_CO.exp()
    log_p_over_q_CO = log_p_CO.sub_(log_q_CO)
    # m / q = alpha p / q + 1 - alpha, in logarithms, where p / q may be beyond what the format holds
    log_m_over_q_CO = log_p_over_q_CO + math.log(alpha)
    torch.logaddexp(log_m_over_q_CO, log_p_CO.new_tensor(math.log1p(-alpha)), out=log_m_over_q_CO)
    of_teacher_C = log_p_over_q_CO.sub_(log_m_over_q_CO).mul_(p_CO).sum(-1)
    q_CO = torch.exp(log_q_CO, out=p_CO)
    of_student_CO = torch.mul(log_m_over_q_CO, q_CO, out=log_p_CO).mul_(alpha - 1)
    return alpha * of_teacher_C + of_student_CO.sum(-1), of_student_CO


DIVERGENCES: dict[DivergenceKind, Divergence] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "mixture": _mixture,
    "jsd": _jsd,
}
"""`divergence.kind` -> the function behind it."""
