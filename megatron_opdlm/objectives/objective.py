"""What an objective decides of a training step. Everything else, it shares with the others.

The trainer asks it, step by step:

    trajectories = objective.terminal_sequences(tasks, step, dynamic_threshold)      # which sequences
    states = objective.select_states(trajectories, step)                             # masked where

and `TrainStep`, for each global batch of these rows:

    micro_batches = objective.prepare(micro_batches)         # what the loss needs besides: a forward, or nothing
    loss, sums = objective.loss(hidden_TBH, states, targets)         # of one micro-batch
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opdlm.config.schema import Config
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.observability.metrics import MetricAccumulator
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard
from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

MicroBatch = tuple[OnPolicyStates, torch.Tensor | None]
"""States, and what `prepare` found out about them."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run has that objectives are made of."""

    config: Config
    student: PipelineModel
    teacher: PipelineModel | None
    """None for objectives without one."""
    engine: RolloutEngine
    """Decodes with the student, and says which of a step's tasks are this rank's."""
    shard: VocabularyShard
    """The vocabulary rows of this rank that take part in the loss."""
    special: SpecialTokens
    groups: ProcessGroupCollection


class Objective(ABC):
    """For as long as a run lasts. All ranks must make one, and make the same calls of it in the same order."""

    sums: ClassVar[tuple[str, ...]]
    """What `loss` adds up for the metrics, always `loss`, `loss_count` (what Megatron divides the loss by) and
    `trained_tokens` among it."""
    preparation: ClassVar[str]
    """The timed phase that `prepare` belongs to."""
    prepares_with_student: bool = False
    """Whether `prepare` reads the student's weights."""

    def __init__(self, parts: Parts) -> None:
        self.config, self.student, self.teacher = parts.config, parts.student, parts.teacher
        self.engine, self.shard, self.special = parts.engine, parts.shard, parts.special

    @property
    @abstractmethod
    def rows_per_response(self) -> int:
        """Rows that `select_states` makes of each trajectory."""

    @abstractmethod
    def terminal_sequences(
        self, tasks: list[RolloutTask], step: int, dynamic_threshold: float | None
    ) -> list[Trajectory]:
        """One sequence for each of `engine.share(tasks)`, in their order; `tasks` are the step's, on all ranks.

        Some of them only where the engine was told to stop.
        """

    @abstractmethod
    def select_states(self, trajectories: list[Trajectory], step: int) -> OnPolicyStates:
        """The rows to train in, those of a trajectory together, the trajectories in their order."""

    @abstractmethod
    def prepare(self, micro_batches: list[OnPolicyStates]) -> list[MicroBatch]:
        """What the loss needs besides the student's forward, without gradients; it may change the states."""

    @abstractmethod
    def loss(
        self, hidden_TBH: torch.Tensor, states: OnPolicyStates, targets: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a micro-batch before it is divided, and its `sums`, on the last pipeline stage.

        `hidden_TBH` are the student's outputs, of the clean rows, then of the noisy ones.
        """

    def rollout_metrics(self) -> MetricAccumulator:
        """Of the latest `terminal_sequences`, on this rank."""
        return MetricAccumulator()
