"""Random cases for the sampler, what each may draw by float64 arithmetic over lists, and a chi-square test.

case = random_case(seed)
draws = case.draw(rank, num_ranks, group)                 # the package's, of one rank's part of the vocabulary
case.possible(position)                                   # {(id, log-probability, entropy), ...} of the oracle
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from megatron_opdlm.config.schema import RolloutConfig
from tests.references import draw_slowly, entropy_slowly

TOLERANCE = 1e-12
"""What rounding may move the edge of a nucleus or of a token's share by."""
# Few values, so that ties are common; dyadic, so that float32 and float64 mean the same.
LOGITS = [-math.inf, -3.0, -1.0, 0.0, -0.0, 0.5, 0.5, 1.0, 1.0, 2.0]
TEMPERATURES = [0.0, 0.0, 0.25, 0.5, 1.0, 1.0, 1.5, 8.0]
TOP_PS = [1e-9, 0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9, 0.999, 1.0, 1.0, 1.0]
DEAD_LOGIT = 50.0
"""What the padding and the mask token have: drawn at once where nobody takes them out."""


@dataclass(frozen=True)
class SamplingCase:
    """Logits over a vocabulary that is padded to a multiple of four, and how to draw from them."""

    logits_NV: torch.Tensor
    uniforms_N: torch.Tensor
    temperatures_N: torch.Tensor
    vocab_size: int
    mask_token_id: int
    top_k: int
    top_p: float

    def draw(self, rank: int = 0, num_ranks: int = 1, group=None):
        """The package's draws, with this rank's part of the vocabulary."""
        from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard
        from megatron_opdlm.rollout.token_sampling import draw_tokens

        num_rows = self.logits_NV.shape[1] // num_ranks
        shard = VocabularyShard(rank * num_rows, num_rows, self.vocab_size, self.mask_token_id, group)
        logits_NV = self.logits_NV[:, shard.first : shard.first + num_rows].clone()
        filters = {"top_k": self.top_k, "top_p": self.top_p, "with_entropy": True}
        return draw_tokens(logits_NV, self.uniforms_N, self.temperatures_N, shard, **filters)

    def live_logits(self, position: int) -> torch.Tensor:
        """float64, without padding, minus infinity at the mask token."""
        logits = self.logits_NV[position, : self.vocab_size].double()
        if self.mask_token_id < self.vocab_size:
            logits[self.mask_token_id] = -math.inf
        return logits

    def possible(self, position: int) -> set[tuple[int, float, float]]:
        """(id, log-probability, entropy) that the oracle draws: one, or a few where rounding decides."""
        logits, uniform = self.live_logits(position), float(self.uniforms_N[position])
        found = set()
        for top_p in {1.0} if self.top_p == 1 else {self.top_p * (1 - TOLERANCE), self.top_p * (1 + TOLERANCE)}:
            rollout = RolloutConfig(temperature=float(self.temperatures_N[position]), top_k=self.top_k, top_p=top_p)
            for moved in (uniform - TOLERANCE, uniform + TOLERANCE):
                token = draw_slowly(logits, min(max(moved, 0.0), 1 - 2 * TOLERANCE), rollout)
                found.add((token, float(logits.log_softmax(0)[token]), entropy_slowly(logits, rollout)))
        return found


def random_case(seed: int, num_positions: int = 8) -> SamplingCase:
    """Up to eleven tokens, at least one of which can be drawn; every position has its own temperature."""
    rng = random.Random(seed)
    vocab_size = rng.randint(2, 11)
    mask_token_id = rng.choice([vocab_size, rng.randrange(vocab_size)])  # a vocabulary without it, or with it
    is_tied = rng.random() < 0.7
    rows = []
    for _ in range(num_positions):
        row = [rng.choice(LOGITS) if is_tied else rng.gauss(0, 3) for _ in range(vocab_size)]
        if all(value == -math.inf for token, value in enumerate(row) if token != mask_token_id):
            row[0 if mask_token_id else 1] = 0.0
        if mask_token_id < vocab_size:
            row[mask_token_id] = DEAD_LOGIT
        rows.append(row + [DEAD_LOGIT] * (-vocab_size % 4))
    return SamplingCase(
        logits_NV=torch.tensor(rows),
        uniforms_N=torch.tensor(
            [rng.choice([0.0, 0.5, 1 - 2**-53, *(rng.random() for _ in range(9))]) for _ in rows]
        ).double(),
        temperatures_N=torch.tensor([rng.choice(TEMPERATURES) for _ in rows]),
        vocab_size=vocab_size,
        mask_token_id=mask_token_id,
        top_k=rng.choice([0, 0, 0, 1, 2, 3, vocab_size, vocab_size + 7]),
        top_p=rng.choice(TOP_PS),
    )


SPREAD = {
    "plain": {},
    "warm": {"temperature": 1.5},
    "top-k": {"top_k": 9},
    "top-p": {"top_p": 0.8},
    "top-k and top-p, warm": {"top_k": 12, "top_p": 0.75, "temperature": 1.5},
}
"""Settings whose draws are counted."""
NUM_DRAWS = 24_000


def counted_case(settings: dict) -> SamplingCase:
    """The same 38 tokens, at random, at all of `NUM_DRAWS` positions, with random uniform numbers of a fixed seed."""
    generator = torch.Generator().manual_seed(3)
    logits = 1.5 * torch.randn(40, generator=generator)
    logits[7] = logits[38:] = DEAD_LOGIT
    return SamplingCase(
        logits_NV=logits.expand(NUM_DRAWS, -1),
        uniforms_N=torch.rand(NUM_DRAWS, dtype=torch.float64, generator=generator),
        temperatures_N=torch.full((NUM_DRAWS,), settings.get("temperature", 1.0)),
        vocab_size=38,
        mask_token_id=7,
        top_k=settings.get("top_k", 0),
        top_p=settings.get("top_p", 1.0),
    )


def chi_square_p_value(counts: torch.Tensor, probabilities: list[float]) -> float:
    """How likely counts at least this far from the expected ones are, if the probabilities are right.

    Pearson's test. Outcomes expected less than five times are one outcome; one that cannot be must not have been.
    """
    expected = counts.sum() * torch.tensor(probabilities, dtype=torch.float64)
    if counts[expected == 0].any():
        return 0.0
    is_rare = expected < 5
    observed, expected = (
        torch.cat([x[~is_rare].double(), x[is_rare].double().sum()[None]]) for x in (counts, expected)
    )
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor(len(expected) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))
