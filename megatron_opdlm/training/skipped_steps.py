"""Optimizer steps left out because their loss or gradient is not finite: found on all ranks alike, told, counted.

    skipped_steps = SkippedSteps(run_directory, max_in_a_row=10, training_step=lambda: trainer.step)
    if not skipped_steps.is_due(student, micro_batches, losses):         # all ranks get the same answer
        optimizer_step(student)

A step that is left out changes neither weights nor optimizer nor learning rate. Each is a line of
`skipped_steps.jsonl` in the run directory:

    {"step": 7, "loss_is_finite": false, "gradient_is_finite": false, "prompt_ids": [1412]}

The prompts are those of the micro-batches whose loss is not finite: the rows themselves where
`training.micro_batch_size` is 1. If only the gradient is not, nobody knows whose it was, and those of the whole global
batch are named.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.parallel.device import device
from megatron_opdlm.training.optimizer import TrainableStudent, gradient_size

logger = logging.getLogger(__name__)

FILE = "skipped_steps.jsonl"


class TooManySkippedSteps(ValueError):
    """The run goes nowhere: one optimizer step after the other is not finite."""


class SkippedSteps:
    """Decides over each optimizer step of a run. All ranks must make one, and make the same calls."""

    def __init__(self, run_directory: Path, max_in_a_row: int, training_step: Callable[[], int]) -> None:
        self._file, self._max_in_a_row, self._training_step = run_directory / FILE, max_in_a_row, training_step
        self._in_a_row = 0

    def is_due(self, student: TrainableStudent, micro_batches: list[OnPolicyStates], losses: list[float]) -> bool:
        """Whether the optimizer step must be left out, the same on all ranks, which must all call it.

        `micro_batches` are this rank's, `losses` theirs, or none where another pipeline stage has them. The gradients
        are reduced already. One all-reduce of two numbers over the world; if the answer is yes, also a gathering of
        prompt ids.

        Raises:
            TooManySkippedSteps: it is the last one in a row that is put up with.
        """
        suspects = [rows for rows, loss in zip(micro_batches, losses, strict=False) if not math.isfinite(loss)]
        is_sick_2 = torch.stack(
            [torch.tensor(float(bool(suspects)), device=device()), ~gradient_size(student).isfinite()]
        )
        dist.all_reduce(is_sick_2, op=dist.ReduceOp.MAX)
        loss_is_sick, gradient_is_sick = is_sick_2.bool().tolist()
        if not (loss_is_sick or gradient_is_sick):
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        prompt_ids = _prompt_ids_of_all(suspects if loss_is_sick else micro_batches)
        self._tell(not loss_is_sick, not gradient_is_sick, prompt_ids)
        return True

    def _tell(self, loss_is_finite: bool, gradient_is_finite: bool, prompt_ids: list[int]) -> None:
        step, what = self._training_step(), "gradient" if loss_is_finite else "loss"
        if dist.get_rank() == 0:
            logger.warning("step %d: the %s is not finite, optimizer step skipped; prompts %s", step, what, prompt_ids)
            record = {
                "step": step,
                "loss_is_finite": loss_is_finite,
                "gradient_is_finite": gradient_is_finite,
                "prompt_ids": prompt_ids,
            }
            self._note(record)
        if self._in_a_row >= self._max_in_a_row:
            raise TooManySkippedSteps(
                f"training.max_skipped_steps ({self._max_in_a_row}) optimizer steps in a row were not finite, the last "
                f"one in step {step}: its {what} of prompts {prompt_ids}. The weights are those before them; "
                f"{self._file} lists the prompts of each"
            )

    def _note(self, record: dict) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._file, error)


def _prompt_ids_of_all(micro_batches: list[OnPolicyStates]) -> list[int]:
    """The prompts of these rows, of all ranks, ascending."""
    own = [prompt_id for states in micro_batches for prompt_id in states.prompt_ids_B.tolist()]
    by_rank: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(by_rank, own)
    return sorted({prompt_id for ids in by_rank for prompt_id in ids})
