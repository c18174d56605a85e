"""What the ranks have trained on together, for the audit file of the run (`observability.audit`).

    audit = PromptAudit(run / "audit.jsonl", groups.dp)
    audit.begin(step=20)
    audit.record(20, trajectories, num_responses_per_prompt=1)

The record is made from the trajectories that were trained, not from the list of prompts that were asked for.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch.distributed as dist

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.observability.audit import AuditWriter


class PromptAudit:
    """The audit of a run; rank 0 writes it. `group` are the data-parallel ranks."""

    def __init__(self, path: Path, group: dist.ProcessGroup) -> None:
        self._path, self._group = path, group
        self._writer: AuditWriter | None = None

    def begin(self, step: int) -> None:
        """Opens the file: the run starts, or goes on, at this step."""
        if dist.get_rank() == 0:
            self._writer = AuditWriter(self._path, step)

    def record(self, step: int, trajectories: list[Trajectory], num_responses_per_prompt: int) -> None:
        """Notes the prompts of the step. All ranks must call it, each with its share of the trajectories."""
        ids_by_rank: list[list[int]] = [[]] * self._group.size()
        own_ids = [trajectory.prompt_id for trajectory in trajectories]
        dist.all_gather_object(ids_by_rank, own_ids, group=self._group)
        if self._writer is not None:
            # Tasks are dealt out to the ranks in turn (`RolloutEngine.share`), those of a prompt one after another.
            in_order = list(itertools.chain.from_iterable(zip(*ids_by_rank, strict=True)))
            self._writer.record(step, in_order[::num_responses_per_prompt])

    def close(self) -> None:
        """Closes the file. Steps that follow are not noted."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
