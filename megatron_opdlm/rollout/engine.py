"""From prompts to trajectories: this rank's share, in batches of similar length.

    engine = RolloutEngine(model, config.rollout, special, seed=config.training.seed)
    trajectories = engine.generate(prompts, step=3, max_new_tokens=lambda prompt: 256)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.diffusion.randomness import sequence_generator
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.models.build import Qwen3Model
from megatron_opdlm.rollout.block_decoder import BlockDecoder, DecodingRequest


class RolloutEngine:
    """Decodes prompts with the student as it is at the time of the call."""

    def __init__(self, model: Qwen3Model, rollout: RolloutConfig, special: SpecialTokens, seed: int) -> None:
        self.model = model
        self.rollout = rollout
        self.special = special
        self.seed = seed
        self.num_forwards = 0

    @torch.no_grad()
    def generate(
        self, prompts: list[Prompt], step: int, max_new_tokens: Callable[[Prompt], int]
    ) -> list[Trajectory]:
        """One trajectory per prompt, in their order. All ranks of a tensor-parallel group pass the same prompts."""
        requests = [self._request(prompt, step, max_new_tokens(prompt)) for prompt in prompts]
        longest_first = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids))
        trajectories: dict[int, Trajectory] = {}
        for begin in range(0, len(requests), self.rollout.batch_size):
            batch = longest_first[begin : begin + self.rollout.batch_size]
            decoder = BlockDecoder(self.model, [requests[index] for index in batch], self.rollout, self.special)
            trajectories |= dict(zip(batch, decoder.decode(), strict=True))
            self.num_forwards += decoder.num_forwards
        return [trajectories[index] for index in range(len(requests))]

    def _request(self, prompt: Prompt, step: int, max_new_tokens: int) -> DecodingRequest:
        return DecodingRequest(
            prompt_id=prompt.prompt_id,
            prompt_ids=list(prompt.token_ids),
            max_new_tokens=max_new_tokens,
            generator=sequence_generator(self.seed, step, prompt.prompt_id, 0, purpose="rollout"),
            domain=prompt.domain,
        )
