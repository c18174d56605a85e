"""Sequences that the student did not write, among those that it did.

    off_policy_fraction_at(30, objective, max_steps=120)                 # 0.5 decaying linearly: 0.375
    OffPolicyMixture(parts).terminal_sequences(tasks, step=30, dynamic_threshold=None)

An ablation of on-policy distillation, and a start for a student whose own text is still noise. Each task of a step is
drawn by itself: with the probability of the step its sequence is the teacher's response, or the one in the data. It
depends on the seed, the step, the prompt and the sample alone, so neither on the layout nor on a restart.

The teacher decodes with the engine of the student, in blocks of one token that the output before predicts, which is
autoregressive decoding, with the temperature, the top-k and the top-p of the rollout. Its response is then laid on the
student's grid (`Trajectory.given`); it writes up to the end of the last block, so that no fill stands where a limit
cut it short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megatron_opdlm.config.schema import ObjectiveConfig
from megatron_opdlm.diffusion.blocks import round_up_to_grid
from megatron_opdlm.diffusion.randomness import sequence_generator
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.objectives.objective import Parts
from megatron_opdlm.observability.metrics import MetricAccumulator
from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}
"""`objective.off_policy_decay` -> what is left of the fraction, by progress from 0 to 1."""


def off_policy_fraction_at(step: int, objective: ObjectiveConfig, max_steps: int) -> float:
    """The probability that a sequence of training step `step` (from 0) is off-policy."""
    progress = min(step / (objective.off_policy_steps or max_steps), 1.0)
    return objective.off_policy_fraction * DECAYS[objective.off_policy_decay](progress)


def given_response(
    task: RolloutTask, response_ids: Sequence[int], max_new_tokens: int, block_size: int, fill_token_id: int
) -> Trajectory:
    """A response to the task that the student did not write, on its grid, of which `max_new_tokens` count at most."""
    return Trajectory.given(
        prompt_id=task.prompt.prompt_id,
        sample_index=task.sample_index,
        prompt_ids=task.prompt.token_ids,
        response_ids=response_ids,
        max_new_tokens=max_new_tokens,
        fill_token_id=fill_token_id,
        block_size=block_size,
        domain=task.prompt.domain,
    )


class OffPolicyMixture:
    """Chooses who writes a sequence, and has it written. All ranks must make one."""

    def __init__(self, parts: Parts) -> None:
        self.objective, self.training = parts.config.objective, parts.config.training
        self.block_size, self.fill_token_id = parts.config.rollout.block_size, parts.special.end_token_ids[0]
        self.engine, self.teacher = parts.engine, parts.teacher
        reads_data = self.objective.off_policy_source == "data"
        self.teacher_engine = None if reads_data else _autoregressive_engine(parts)
        self._metrics = MetricAccumulator()

    def terminal_sequences(
        self, tasks: list[RolloutTask], step: int, dynamic_threshold: float | None
    ) -> list[Trajectory]:
        """As `Objective.terminal_sequences`."""
        fraction = off_policy_fraction_at(step, self.objective, self.training.max_steps)
        others = {place: task for place, task in enumerate(tasks) if self._is_off_policy(task, step, fraction)}
        own = {place: task for place, task in enumerate(tasks) if place not in others}
        # Where nothing is to be decoded all ranks know it, and none of them begins.
        made = self.engine.generate_some(own, step, dynamic_threshold) if own else {}
        made |= self._written_by_others(others, step) if others else {}
        self._metrics = self.engine.statistics.metrics() if own else MetricAccumulator()
        self._metrics.add("rollout/off_policy_fraction", len(others) / len(tasks))
        return [made[place] for place in self.engine.share(list(range(len(tasks)))) if place in made]

    def metrics(self) -> MetricAccumulator:
        """Of the latest call on this rank."""
        return self._metrics

    def _is_off_policy(self, task: RolloutTask, step: int, fraction: float) -> bool:
        numbers = (self.training.seed, step, task.prompt.prompt_id, task.sample_index)
        generator = sequence_generator(*numbers, purpose="off_policy")
        return torch.rand((), generator=generator, dtype=torch.float64).item() < fraction

    def _written_by_others(self, tasks: dict[int, RolloutTask], step: int) -> dict[int, Trajectory]:
        if self.teacher_engine is None:
            responses = {place: task.prompt.response_ids for place, task in tasks.items()}
        else:
            longer = {place: self._to_end_of_block(task) for place, task in tasks.items()}
            with self.teacher.on_device():
                written = self.teacher_engine.generate_some(longer, step)
            responses = {place: trajectory.response_ids.tolist() for place, trajectory in written.items()}
        return {
            place: given_response(
                tasks[place], response_ids, tasks[place].max_new_tokens, self.block_size, self.fill_token_id
            )
            for place, response_ids in responses.items()
        }

    def _to_end_of_block(self, task: RolloutTask) -> RolloutTask:
        num_prompt = len(task.prompt.token_ids)
        num_tokens = round_up_to_grid(num_prompt + task.max_new_tokens, self.block_size)
        return replace(task, max_new_tokens=num_tokens - num_prompt)


def _autoregressive_engine(parts: Parts) -> RolloutEngine:
    rollout = replace(
        parts.config.rollout,
        block_size=1,
        denoising_steps_per_block=1,
        logit_shift="next_token",
        remasking_strategy="sequential",
    )
    # The teacher may lack the student's last rows, the mask token's among them: it draws from those of the loss.
    special = replace(parts.special, vocab_size=parts.shard.vocab_size)
    stop = parts.engine.should_stop
    return RolloutEngine(parts.teacher, rollout, special, parts.config.training.seed, parts.groups, should_stop=stop)
