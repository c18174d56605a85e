"""The student behind `generate`: rank 0 asks, all ranks decode.

    student = Student(config)                       # config and tokenizer
    student.load()                                  # groups and weights
    if rank() == 0:
        trajectories = student.answer(prompts, turn=0, on_step=show)
        student.dismiss()
    else:
        student.follow()

Rank 0 may wait for a person between two calls, longer than collectives wait. So the others look into the store at which
the ranks met, and enter a collective only when rank 0 has said there that it does too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_opdlm.config.schema import Config
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.evaluation.evaluated_model import open_evaluated_model
from megatron_opdlm.parallel.initialize import control_store, initialize
from megatron_opdlm.rollout.denoising_step import DenoisingStep
from megatron_opdlm.rollout.engine import RolloutTask

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
"""How often the others look whether rank 0 has something to do."""

OnFinished = Callable[[int, Trajectory], None]
OnStep = Callable[[DenoisingStep], None]


class Student:
    """Answers with one model, by the `rollout` settings."""

    def __init__(self, config: Config) -> None:
        """All ranks make one. ValueError for a folder that does not fit."""
        self.rollout = config.rollout
        self.opened = open_evaluated_model(config)
        self.tokenizer = self.opened.tokenizer
        self.num_positions = self.opened.source.architecture.max_position_embeddings
        self._num_calls = 0
        origin = self.opened.pretrained.architecture
        if origin.mask_token_id is None and not origin.is_block_diffusion:
            logger.warning("%s names no mask token: an autoregressive model, which answers noise", self.opened.folder)

    def load(self) -> None:
        """Joins the world and reads the weights. All ranks must call it."""
        config = self.opened.config
        self.groups = initialize(config.parallel, config.training.seed)
        self.engine = self.opened.load(self.groups).engine()
        self._store = control_store()

    def check_length(self, prompt: Prompt) -> None:
        """ValueError for a prompt that leaves no place for a response."""
        number = len(prompt.token_ids)
        if number >= self.num_positions:
            raise ValueError(
                f"prompt {prompt.prompt_id + 1} has {number} tokens; with a response it must not exceed the "
                f"{self.num_positions} positions of the model (max_position_embeddings)"
            )

    def answer(
        self, prompts: Sequence[Prompt], turn: int, on_finished: OnFinished | None = None, on_step: OnStep | None = None
    ) -> list[Trajectory]:
        """`rollout.num_responses_per_prompt` responses to each prompt, in their order. Rank 0 alone calls it.

        `turn` makes the random numbers of one call differ from those of the next. Who watches is told of what rank 0
        decodes, by the place in the result.
        """
        tasks = [
            RolloutTask(prompt, self._limit(prompt), sample)
            for prompt in prompts
            for sample in range(self.rollout.num_responses_per_prompt)
        ]
        self._call((tasks, turn))
        return self._decode(tasks, turn, on_finished, on_step)

    def follow(self) -> None:
        """Decodes with rank 0 until that one dismisses the others, who call this."""
        while (work := self._called()) is not None:
            self._decode(*work)

    def dismiss(self) -> None:
        """Lets the other ranks go on. Rank 0 calls it."""
        self._call(None)

    def _limit(self, prompt: Prompt) -> int:
        """Longest response: by the settings, and by the positions that the model has."""
        room = self.num_positions - len(prompt.token_ids)
        return min(self.rollout.max_new_tokens, self.rollout.max_new_tokens_by_domain.get(prompt.domain, room), room)

    def _decode(
        self,
        tasks: list[RolloutTask],
        turn: int,
        on_finished: OnFinished | None = None,
        on_step: OnStep | None = None,
    ) -> list[Trajectory]:
        """Over all ranks, which get the same."""
        mine = self.engine.generate_some(dict(enumerate(tasks)), turn, on_finished=on_finished, on_step=on_step)
        gathered = [None] * self.groups.dp.size()
        dist.all_gather_object(gathered, mine, group=self.groups.dp)
        return [
            trajectory for _, trajectory in sorted((pair for part in gathered for pair in part.items()), key=_place)
        ]

    def _call(self, work: tuple[list[RolloutTask], int] | None) -> None:
        if dist.get_world_size() > 1:
            self._store.set(self._next_key(), "")
            dist.broadcast_object_list([work], src=0)

    def _called(self) -> tuple[list[RolloutTask], int] | None:
        key, work = self._next_key(), [None]
        while not self._store.check([key]):
            time.sleep(POLL_SECONDS)
        dist.broadcast_object_list(work, src=0)
        return work[0]

    def _next_key(self) -> str:
        self._num_calls += 1
        return f"generate {self._num_calls}"


def _place(pair: tuple[int, Trajectory]) -> int:
    return pair[0]
