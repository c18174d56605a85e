"""Keeps a few rollouts of every so many steps, with the teacher's word on each token, for people to look at.

    kept = KeptTrajectories(parts, tokenizer)
    kept.begin(step=0)
    if kept.is_due(step):
        kept.keep(step, trajectories)              # before the step's training: the weights are those of the rollout

Rank 0 writes its own; `observability.trajectories` is the file. Nothing here changes the run: no random number is
drawn, and both models run forward only. Without a teacher, or with `logging.trajectory_interval` 0, nothing is ever
due.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distillation.inspection import Inspection, inspect_trajectory
from megatron_opdlm.objectives.objective import Parts
from megatron_opdlm.observability.trajectories import FILE, KeptTrajectory, TrajectoryWriter
from megatron_opdlm.parallel.device import device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = 6
"""Decimals of what is written: log-probabilities in float32 have no more, and the file stays small."""


class KeptTrajectories:
    """All ranks must make one, and make the same calls."""

    def __init__(self, parts: Parts, tokenizer: PreTrainedTokenizerBase) -> None:
        self._parts, self._tokenizer = parts, tokenizer
        self._writer: TrajectoryWriter | None = None

    def begin(self, step: int) -> None:
        """The run starts, or goes on, at this step."""
        logging = self._parts.config.logging
        if logging.trajectory_interval and self._parts.teacher is not None and dist.get_rank() == 0:
            self._writer = TrajectoryWriter(Path(logging.directory) / FILE, step)

    def is_due(self, step: int) -> bool:
        """Whether some of this step's rollouts are to be kept."""
        interval, last_step = self._parts.config.logging.trajectory_interval, self._parts.config.training.max_steps - 1
        return bool(interval) and self._parts.teacher is not None and (step % interval == 0 or step == last_step)

    def keep(self, step: int, trajectories: list[Trajectory]) -> None:
        """Looks at the first few of this rank's and, on rank 0, writes those that the student wrote itself.

        All ranks must call it, each with its share. They look at equally many, as the smallest share allows: the models
        may need all ranks for a forward.
        """
        parts, config, kept = self._parts, self._parts.config, []
        number = torch.tensor(min(len(trajectories), config.logging.num_trajectories), device=device())
        dist.all_reduce(number, op=dist.ReduceOp.MIN)
        for trajectory in trajectories[: int(number)]:
            inspection = inspect_trajectory(
                parts.student,
                parts.teacher,
                trajectory,
                parts.shard,
                parts.special,
                config.rollout,
                config.divergence,
                config.training,
            )
            if self._writer is not None and not trajectory.is_given:
                kept.append(kept_trajectory(step, trajectory, inspection, self._tokenizer))
        if self._writer is not None:
            self._writer.write(kept)


def kept_trajectory(
    step: int, trajectory: Trajectory, inspection: Inspection, tokenizer: PreTrainedTokenizerBase
) -> KeptTrajectory:
    """The trajectory and what was found out about it, as numbers and text."""
    alternatives = [
        [(token_id, round(value, DIGITS)) for token_id, value in zip(ids, values, strict=True) if math.isfinite(value)]
        for ids, values in zip(
            inspection.alternative_ids_Rk.tolist(), inspection.alternative_log_probs_Rk.tolist(), strict=True
        )
    ]
    ids = trajectory.terminal_ids_T.tolist()
    all_ids = sorted({*ids, *(token_id for some in alternatives for token_id, _ in some)})
    return KeptTrajectory(
        step=step,
        prompt_id=trajectory.prompt_id,
        sample_index=trajectory.sample_index,
        domain=trajectory.domain,
        stop_reason=trajectory.stop_reason,
        block_size=trajectory.block_size,
        response_length=trajectory.response_length,
        prompt_ids=ids[: trajectory.prompt_length],
        token_ids=ids[trajectory.prompt_length :],
        step_map=trajectory.step_map_R.tolist(),
        log_probs=_figures(trajectory.log_probs_R),
        divergence=_figures(inspection.divergence_R),
        teacher_log_probs=_figures(inspection.teacher_log_prob_R),
        alternatives=alternatives,
        texts={str(token_id): token_text(tokenizer, token_id) for token_id in all_ids},
    )


def _figures(values_R: torch.Tensor) -> list[float | None]:
    """What is no number becomes None, which JSON has a word for."""
    return [round(value, DIGITS) if math.isfinite(value) else None for value in values_R.tolist()]


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as text. One that is a part of a character has the tokenizer's own spelling, such as `âĤ`.

    An id without a token, which a padded vocabulary has, is written as its number.
    """
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    return tokenizer.convert_ids_to_tokens(token_id) or f"[{token_id}]"
