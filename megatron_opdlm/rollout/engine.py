"""From prompts to trajectories: this rank's share, in batches of similar length.

engine = RolloutEngine(model, config.rollout, special, seed=config.training.seed)
trajectories = engine.generate([RolloutTask(prompt, max_new_tokens=256)], step=3)
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.diffusion.randomness import sequence_generator
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.rollout.block_decoder import BlockDecoder, DecodingRequest
from megatron_opdlm.rollout.rounds import keep_company


@dataclass(frozen=True)
class RolloutTask:
    """A prompt to respond to."""

    prompt: Prompt
    max_new_tokens: int
    sample_index: int = 0
    """Which response to that prompt in this step."""


class RolloutEngine:
    """Decodes prompts with the student as it is at the time of the call."""

    def __init__(self, model: PipelineModel, rollout: RolloutConfig, special: SpecialTokens, seed: int) -> None:
        self.model = model
        self.rollout = rollout
        self.special = special
        self.seed = seed
        self.num_forwards = 0
        self.pipeline_bubble: float | None = None
        """Of the latest rollout, the share of the pipeline stages' time in which they waited for another stage."""

    @torch.no_grad()
    def generate(self, tasks: list[RolloutTask], step: int) -> list[Trajectory]:
        """One trajectory per task, in their order.

        All ranks of a tensor- and of a pipeline-parallel group pass the same tasks. Ranks that share experts must all
        call it, with any number of tasks, also none.
        """
        link, started = self.model.link, time.perf_counter()
        link.clock.take()
        requests = [self._request(task, step) for task in tasks]
        longest_first = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids))
        trajectories: dict[int, Trajectory] = {}
        for begin in range(0, len(requests), self.rollout.batch_size):
            batch = longest_first[begin : begin + self.rollout.batch_size]
            decoder = BlockDecoder(self.model, [requests[index] for index in batch], self.rollout, self.special)
            trajectories |= dict(zip(batch, decoder.decode(), strict=True))
            self.num_forwards += decoder.num_forwards
        keep_company(self.model, self.rollout.block_size)
        if link.num_stages > 1:
            self.pipeline_bubble = link.idle_share(time.perf_counter() - started)
        return [trajectories[index] for index in range(len(requests))]

    def _request(self, task: RolloutTask, step: int) -> DecodingRequest:
        prompt_id, sample_index = task.prompt.prompt_id, task.sample_index
        return DecodingRequest(
            prompt_id=prompt_id,
            sample_index=sample_index,
            prompt_ids=list(task.prompt.token_ids),
            max_new_tokens=task.max_new_tokens,
            generator=sequence_generator(self.seed, step, prompt_id, sample_index, purpose="rollout"),
            domain=task.prompt.domain,
        )
