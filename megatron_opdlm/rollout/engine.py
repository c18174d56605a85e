"""From prompts to trajectories, with the student as it is at the time of the call.

    engine = RolloutEngine(model, config.rollout, special, seed=config.training.seed, groups=groups)
    tasks = [RolloutTask(prompt, max_new_tokens=256) for prompt in prompts]      # the same on all ranks
    trajectories = engine.generate(tasks, step=3)                                # of this rank's `engine.share(tasks)`
    engine.statistics.metrics().values()

The data-parallel ranks share the work (`rollout.work_queue`): who decodes a task has nothing to do with whose it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.diffusion.randomness import sequence_generator
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.device import device
from megatron_opdlm.rollout.attention_choice import choose_attention
from megatron_opdlm.rollout.denoising_step import DenoisingStep
from megatron_opdlm.rollout.generation import Generation
from megatron_opdlm.rollout.sequences import DecodingRequest
from megatron_opdlm.rollout.statistics import RolloutStatistics
from megatron_opdlm.rollout.work_queue import WorkQueue, exchange

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
NUM_NAMED = 10
"""Prompts that a warning names."""


@dataclass(frozen=True)
class RolloutTask:
    """A prompt to respond to."""

    prompt: Prompt
    max_new_tokens: int
    sample_index: int = 0
    """Which response to that prompt in this step."""
    temperature: float | None = None
    """Instead of `rollout.temperature`."""
    seed: int | None = None
    """Instead of the engine's."""


class RolloutEngine:
    """Decodes prompts with the student.

    With `groups` the ranks of all its data- and context-parallel groups share the tasks of a call; without, each rank
    decodes its own. Every few forwards it asks `should_stop`, which all ranks or none must give. Where a rank says yes,
    the ranks that forward together with it return what they have finished; all others that share the tasks do so too as
    long as there are tasks to be dealt, and otherwise as soon as they are through or one of them says yes.
    """

    def __init__(
        self,
        model: PipelineModel,
        rollout: RolloutConfig,
        special: SpecialTokens,
        seed: int,
        groups: ProcessGroupCollection | None = None,
        show_progress: bool = False,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self.model, self.rollout, self.special, self.seed = model, rollout, special, seed
        self.show_progress, self._has_decoded, self.should_stop = show_progress, False, should_stop
        self._build_attention = choose_attention(rollout, model.config, device())
        self.statistics = RolloutStatistics.of_blocks(rollout.block_size)
        """Of the latest rollout."""
        self._group = groups.dp_cp if groups is not None and groups.dp_cp.size() > 1 else None
        self._place, self._num_shares = (0, 1) if groups is None else (groups.dp.rank(), groups.dp.size())
        self._places = [0] if self._group is None else [0] * self._group.size()
        if self._group is not None:
            dist.all_gather_object(self._places, self._place, group=self._group)

    def share(self, items: list[Item]) -> list[Item]:
        """This rank's part of a list that belongs to all data-parallel ranks."""
        return items[self._place :: self._num_shares]

    def generate(self, tasks: list[RolloutTask], step: int, dynamic_threshold: float | None = None) -> list[Trajectory]:
        """One trajectory for each of `share(tasks)`, in their order; some of them only if `should_stop` said yes.

        `dynamic_threshold` takes the place of `rollout.dynamic_threshold` in this call.

        All ranks must call it with the same tasks; without `groups` those of a tensor- and of a pipeline-parallel
        group, and ranks that share experts with any tasks, also none. ValueError if the cache cannot hold the longest.
        """
        return list(self.generate_some(dict(enumerate(tasks)), step, dynamic_threshold).values())

    def generate_some(
        self,
        tasks: dict[int, RolloutTask],
        step: int,
        dynamic_threshold: float | None = None,
        on_finished: Callable[[int, Trajectory], None] | None = None,
        on_step: Callable[[DenoisingStep], None] | None = None,
    ) -> dict[int, Trajectory]:
        """`generate` for some tasks of a list, by their places in it; `share` of the whole list says who gets which.

        `on_finished` is told each of them as soon as it is done, on the ranks that decoded it, and `on_step` what each
        denoising step has committed. What they raise ends the call; with several ranks all of them must raise it.
        """
        places, tasks = list(tasks), list(tasks.values())
        queue = WorkQueue([len(task.prompt.token_ids) + task.max_new_tokens for task in tasks], self._group)
        requests = [self._request(index, task, step) for index, task in enumerate(tasks)]
        threshold = self.rollout.dynamic_threshold if dynamic_threshold is None else dynamic_threshold
        rollout = replace(self.rollout, dynamic_threshold=threshold)
        generation = Generation(
            self.model,
            rollout,
            self.special,
            requests,
            queue,
            self._build_attention,
            self.show_progress,
            logging.DEBUG if self._has_decoded else logging.INFO,  # the size of the cache, once
            on_finished and (lambda index, trajectory: on_finished(places[index], trajectory)),
            on_step and (lambda step: on_step(replace(step, index=places[step.index]))),
            self.should_stop,
        )
        self._has_decoded = True
        with _without_autograd(self.model):
            finished = generation.run()
        finished = {places[index]: _for_autograd(trajectory) for index, trajectory in finished.items()}
        self.statistics = generation.statistics
        trajectories = dict(sorted(self._bring_home(finished).items()))
        _tell_of_sick(trajectories.values())
        return trajectories

    def _request(self, index: int, task: RolloutTask, step: int) -> DecodingRequest:
        prompt, seed = task.prompt, self.seed if task.seed is None else task.seed
        return DecodingRequest(
            index=index,
            prompt_id=prompt.prompt_id,
            sample_index=task.sample_index,
            prompt_ids=list(prompt.token_ids),
            max_new_tokens=task.max_new_tokens,
            temperature=self.rollout.temperature if task.temperature is None else task.temperature,
            generator=sequence_generator(seed, step, prompt.prompt_id, task.sample_index, purpose="rollout"),
            domain=prompt.domain,
        )

    def _bring_home(self, finished: dict[int, Trajectory]) -> dict[int, Trajectory]:
        """Exchanges what the ranks have decoded, so that each has its share."""
        if self._group is None:
            return finished
        done = time.perf_counter()
        parcels = [
            {index: trajectory for index, trajectory in finished.items() if index % self._num_shares == place}
            for place in self._places
        ]
        received = exchange(parcels, self._group)
        self.statistics.idle_seconds = time.perf_counter() - done
        return {index: trajectory for parcel in received for index, trajectory in parcel.items()}


def _without_autograd(model: PipelineModel) -> AbstractContextManager[object]:
    """Inference mode, which spares a CPU a twelfth of the time that `no_grad` takes, where it may be.

    Not where tensor-parallel ranks share out sequences: Megatron keeps a buffer for all its forwards, training's too,
    which may be made in this one. On a GPU a graph leaves no bookkeeping to spare.
    """
    may_be = device().type == "cpu" and not model.config.sequence_parallel
    return torch.inference_mode() if may_be else torch.no_grad()


def _for_autograd(trajectory: Trajectory) -> Trajectory:
    """The same in copies that training may save for a backward pass, as it may not what inference mode has made."""
    tensors = {name: value.clone() for name, value in vars(trajectory).items() if isinstance(value, torch.Tensor)}
    return replace(trajectory, **tensors)


def _tell_of_sick(trajectories: Collection[Trajectory]) -> None:
    prompt_ids = [trajectory.prompt_id for trajectory in trajectories if trajectory.stop_reason == "not_finite"]
    if prompt_ids:
        message = "rollout: the student's logits were not finite in %d of %d sequences, of prompts %s"
        logger.warning(message, len(prompt_ids), len(trajectories), prompt_ids[:NUM_NAMED])
