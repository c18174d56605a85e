"""What a step has to do: how many sequences, how long, how many tokens a denoising step commits.

    workload = Workload.of(config, prompt_tokens=200, response_tokens=None)
    lengths = workload.sample_lengths(128, seed=0)

A recipe says how long responses may be; how long they are is a property of prompts and student. The paper's run read
0.066 billion response tokens of 61,816 prompts (arXiv 2606.06712), 1,068 each where 4,000 were allowed: that share
of the limit is the default. Their spread is an assumption: a log-normal, cut off at the limit.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from statistics import NormalDist, fmean

from megatron_opdlm.config.schema import Config

SHARE_OF_LIMIT = 0.066e9 / 61_816 / 4000
"""Mean length of a response over the longest allowed, in the paper's run."""
SPREAD = 0.8
"""Standard deviation of the logarithm of a response's length."""
PROMPT = 200
"""Tokens of a prompt in the mean, where a recipe allows as many."""
GRID = 2000
"""Quantiles that stand for a distribution."""


def rows_per_response(config: Config) -> int:
    """Rows that are trained for each response, as `diffusion.state_selections.rows_per_trajectory` makes them."""
    if config.states.selection != "all_steps":
        return 1
    return -(-config.rollout.denoising_steps_per_block // config.states.shrink)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sequences of one training step. Lengths in tokens."""

    num_responses: int
    prompt_tokens: int
    """Mean."""
    response_tokens: float
    """Mean."""
    longest_prompt: int
    longest_response: int
    block_size: int
    tokens_per_step: float
    """Tokens that a denoising step of a sequence commits, in the mean."""
    rows_per_response: int = 1
    spread: float = SPREAD

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        prompt_tokens: int | None = None,
        response_tokens: float | None = None,
        tokens_per_step: float = 1.5,
        spread: float = SPREAD,
    ) -> Workload:
        """Of a step at the full length. ValueError for numbers that no rollout can have."""
        rollout = config.rollout
        longest = -(-rollout.max_new_tokens // rollout.block_size) * rollout.block_size
        mean = SHARE_OF_LIMIT * longest if response_tokens is None else response_tokens
        longest_prompt = config.data.max_prompt_tokens
        prompt = min(PROMPT, longest_prompt) if prompt_tokens is None else prompt_tokens
        if not 1 <= prompt <= longest_prompt:
            raise ValueError(
                f"--prompt-tokens ({prompt}) must lie between 1 and data.max_prompt_tokens ({longest_prompt})"
            )
        if not 1 <= mean <= longest:
            raise ValueError(f"--response-tokens ({mean}) must lie between 1 and rollout.max_new_tokens ({longest})")
        if not 1 <= tokens_per_step <= rollout.block_size:
            raise ValueError(
                f"--tokens-per-step ({tokens_per_step}) must lie between 1 and rollout.block_size "
                f"({rollout.block_size})"
            )
        return cls(
            num_responses=config.training.num_prompts_per_step * rollout.num_responses_per_prompt,
            prompt_tokens=prompt,
            response_tokens=mean,
            longest_prompt=longest_prompt,
            longest_response=longest,
            block_size=rollout.block_size,
            tokens_per_step=tokens_per_step,
            rows_per_response=rows_per_response(config),
            spread=spread,
        )

    @property
    def longest_row(self) -> int:
        """Tokens of one stream of the longest row that must fit."""
        return self.longest_prompt + self.longest_response

    @property
    def steps_per_block(self) -> float:
        """Denoising steps of a block, in the mean."""
        return self.block_size / self.tokens_per_step

    @property
    def trained_share(self) -> float:
        """Positions of a response that a state masks: with s steps of one size, (s + 1) / 2s of a block."""
        return (self.steps_per_block + 1) / (2 * self.steps_per_block)

    def sample_lengths(self, num: int, seed: int) -> list[int]:
        """Lengths of so many responses, whole blocks, in the order of their prompts."""
        generator = random.Random(seed)
        quantiles = _quantiles(self.response_tokens, self.spread, self.longest_response, self.block_size)
        return [generator.choice(quantiles) for _ in range(num)]


@functools.lru_cache
def _quantiles(mean: float, spread: float, longest: int, block_size: int) -> list[int]:
    """Of the log-normal that has this mean once it is cut off at the longest: by bisection."""
    normal = [NormalDist().inv_cdf((place + 0.5) / GRID) for place in range(GRID)]
    low, high = -20.0, math.log(longest) + 20
    for _ in range(60):
        middle = (low + high) / 2
        lengths = [min(math.exp(middle + spread * x), longest) for x in normal]
        low, high = (middle, high) if fmean(lengths) < mean else (low, middle)
    return [max(1, math.ceil(length / block_size)) * block_size for length in lengths]
