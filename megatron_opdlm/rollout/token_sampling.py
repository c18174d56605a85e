"""Drawing a token at each masked position, and how sure the model is of it.

One uniform number decides a position's draw, by the inverse of the cumulative distribution, so a draw depends on
nothing but the logits and that number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_opdlm.config.schema import RolloutConfig


@dataclass(frozen=True)
class Draws:
    """One drawn token for each of N masked positions."""

    ids_N: torch.Tensor
    """int64."""
    log_probs_N: torch.Tensor
    """float32: log of the raw softmax (temperature 1, unfiltered) at the token; its exponential is the confidence."""


def draw_tokens(logits_NV: torch.Tensor, uniforms_N: torch.Tensor, rollout: RolloutConfig) -> Draws:
    """Draws from the distribution after temperature, then top-k, then top-p; temperature 0 takes the most likely.

    Args:
        logits_NV: float32, minus infinity where a token must not be drawn.
        uniforms_N: in [0, 1).
    """
    assert logits_NV.dtype is torch.float32, "confidences must not be quantised by a narrow format"
    if rollout.temperature == 0:
        ids_N = logits_NV.argmax(-1)
    else:
        ids_N = _inverse_cdf(filtered_probabilities(logits_NV, rollout), uniforms_N)
    chosen_N = logits_NV.gather(-1, ids_N[:, None])[:, 0]
    return Draws(ids_N, chosen_N - logits_NV.logsumexp(-1))


def filtered_probabilities(logits_NV: torch.Tensor, rollout: RolloutConfig) -> torch.Tensor:
    """The distribution tokens are drawn from, `[N, V]`, un-normalised where a filter cut it."""
    scaled = logits_NV / rollout.temperature
    if rollout.top_k and rollout.top_k < scaled.shape[-1]:
        smallest_kept = scaled.topk(rollout.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest_kept, float("-inf"))
    probabilities = scaled.softmax(-1)
    return _nucleus(probabilities, rollout.top_p) if rollout.top_p < 1 else probabilities


def _nucleus(probabilities_NV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keeps the most likely tokens until their sum reaches `top_p`; the one that reaches it stays."""
    ordered, order = probabilities_NV.sort(descending=True, stable=True)
    sum_before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(sum_before >= top_p, 0.0))


def _inverse_cdf(probabilities_NV: torch.Tensor, uniforms_N: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative probability exceeds the uniform number; never one of probability zero."""
    cumulative = probabilities_NV.cumsum(-1)
    total = cumulative[:, -1:]
    # u * total may round up to total, beyond the last token that has probability
    targets = (uniforms_N[:, None].to(total.dtype) * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]
