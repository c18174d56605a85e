"""Plain oracles for the whole system: `transformers` under explicit masks, and a decoder without a cache.

They share with the package nothing but the pattern of who attends to whom, which has tests of its own.

    model = load_reference(folder)                                   # Qwen3ForCausalLM in float64
    two_stream_logits(model, clean_BT, noisy_BT, lengths_B, 4)       # what a training forward must give
    decode_slowly(model, prompt_ids, uniforms, settings, ...)        # what a rollout must give

Legend: `B` sequences, `T` positions of one stream, `K` block, `S` denoising steps, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.diffusion.attention_pattern import block_diffusion_mask
from tests.slow_remasking import commits_slowly


def load_reference(folder: Path, dtype: torch.dtype = torch.float64):
    """The folder as `transformers` reads it, with attention that honours a mask `[B, 1, queries, keys]`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",  # of mixtures; the grouped products have no float64
    )
    # PyTorch gives the row of the padding token no gradient, even where a sequence really holds that token.
    model.get_input_embeddings().padding_idx = None
    return model


def masked_logits(model, ids_BT: torch.Tensor, positions_T: torch.Tensor, is_visible: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, V]` of ids at these position ids where bool `is_visible [B, T, T]` says who attends to whom."""
    blocked = torch.zeros(is_visible.shape, dtype=model.dtype).masked_fill(~is_visible, torch.finfo(model.dtype).min)
    return model(input_ids=ids_BT, attention_mask=blocked[:, None], position_ids=positions_T[None]).logits


def two_stream_logits(
    model, clean_BT: torch.Tensor, noisy_BT: torch.Tensor, lengths_B: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[B, T, V]` of the clean and of the noisy stream, read as one sequence of 2T tokens."""
    num_positions = clean_BT.shape[1]
    mask = block_diffusion_mask(lengths_B, num_positions, block_size)
    positions = torch.arange(num_positions).repeat(2)
    return masked_logits(model, torch.cat([clean_BT, noisy_BT], dim=1), positions, mask).chunk(2, dim=1)


@dataclass
class SlowDecoding:
    """What `decode_slowly` gives."""

    terminal_ids: list[int]
    step_map: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    num_steps: int = 0


@torch.no_grad()
def decode_slowly(
    model,
    prompt_ids: list[int],
    uniforms: Iterator[torch.Tensor],
    settings: RolloutConfig,
    *,
    mask_token_id: int,
    end_token_ids: tuple[int, ...],
) -> SlowDecoding:
    """One sequence, all of it read in every step, and loops over positions. `uniforms` gives `[S, K]` a block."""
    size, num_prompt = settings.block_size, len(prompt_ids)
    ids, steps, log_probs = list(prompt_ids), [0] * num_prompt, [0.0] * num_prompt
    result = SlowDecoding(ids)
    while True:
        begin = len(ids) // size * size
        masked = list(range(len(ids), begin + size))
        ids += [mask_token_id] * len(masked)
        steps += [0] * len(masked)
        log_probs += [0.0] * len(masked)
        block_uniforms, step = next(uniforms), 0
        while masked:
            drawn = _draw_at(model, ids, masked, block_uniforms[step], settings, mask_token_id)
            for position in _chosen(drawn, step, settings):
                ids[position], log_probs[position], _ = drawn[position]
                steps[position] = step + 1
                masked.remove(position)
            step += 1
        result.num_steps += step
        has_ended = any(token in end_token_ids for token in ids[max(begin, num_prompt) :])
        if has_ended or len(ids) >= num_prompt + settings.max_new_tokens:
            result.step_map, result.log_probs = steps[num_prompt:], log_probs[num_prompt:]
            return result


def _draw_at(model, ids, masked, uniforms, settings, mask_token_id) -> dict[int, tuple[int, float, float]]:
    """Position -> drawn token, the raw log-probability it has, and the entropy of what it was drawn from."""
    length, size = len(ids), settings.block_size
    block = torch.arange(length) // size
    logits_TV = masked_logits(model, torch.tensor([ids]), torch.arange(length), (block[:, None] >= block)[None])[0]
    drawn = {}
    shift = 1 if settings.logit_shift == "next_token" else 0
    for position in masked:
        logits = logits_TV[position - shift].double()
        logits[mask_token_id] = -torch.inf
        token = draw_slowly(logits, float(uniforms[position % size]), settings)
        drawn[position] = token, float(logits.log_softmax(0)[token]), entropy_slowly(logits, settings)
    return drawn


def draw_slowly(logits: torch.Tensor, uniform: float, settings: RolloutConfig) -> int:
    """The token that a uniform number picks: temperature, top-k, top-p, then the inverse of the cumulative sum."""
    probabilities = slow_distribution(logits, settings)
    total = 0.0
    for token, probability in enumerate(probabilities):
        total += probability
        if total > uniform:
            return token
    raise AssertionError("probabilities sum up to less than the uniform number")


def slow_distribution(logits: torch.Tensor, settings: RolloutConfig) -> list[float]:
    """The distribution that a token is drawn from, one probability per id, in float64."""
    if settings.temperature == 0:
        return [float(token == int(logits.argmax())) for token in range(len(logits))]
    probabilities = (logits.double() / settings.temperature).softmax(0).tolist()
    kept = sorted(range(len(probabilities)), key=lambda token: -float(logits[token]))[: settings.top_k or None]
    whole = sum(probabilities[token] for token in kept)
    nucleus, total = [], 0.0
    for token in kept:
        if total >= settings.top_p * whole and settings.top_p < 1:
            break
        nucleus.append(token)
        total += probabilities[token]
    return [probabilities[token] / total if token in nucleus else 0.0 for token in range(len(probabilities))]


def entropy_slowly(logits: torch.Tensor, settings: RolloutConfig) -> float:
    """Of the distribution that a token is drawn from, in nats."""
    return -sum(p * math.log(p) for p in slow_distribution(logits, settings) if p > 0)


def _chosen(drawn: dict[int, tuple[int, float, float]], step: int, settings: RolloutConfig) -> list[int]:
    """The positions that a denoising step commits."""
    size, num_steps = settings.block_size, settings.denoising_steps_per_block
    begin = min(drawn) // size * size
    _, log_probs, entropies = zip(*(drawn.get(begin + place, (0, 0.0, 0.0)) for place in range(size)), strict=True)
    places = commits_slowly(
        settings.remasking_strategy,
        [math.exp(log_prob) for log_prob in log_probs],
        [begin + place in drawn for place in range(size)],
        size // num_steps + (1 if step < size % num_steps else 0),
        step == num_steps - 1,
        threshold=settings.dynamic_threshold,
        entropies=list(entropies),
        entropy_bound=settings.entropy_bound,
    )
    return [begin + place for place in sorted(places)]
