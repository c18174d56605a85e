"""Decoding sweeps: the same tasks decoded with several thresholds and block sizes, by a model that is built once.

How a student is scored is a function of the decoding settings, so a sweep takes any kind of task:

    points = swept_rollouts(config.evaluation.sweep, config.rollout)          # 5 thresholds x 3 block sizes: 15
    sweep = Sweep(score, points, Path("runs/mine/sweep"), subject={"student": "runs/mine/checkpoints/best"})
    sweep.run()                                             # writes sweep.json, sweep.md and sweep.png there

`score(rollout)` gives `{name of a task: {"accuracy": 0.87, "tokens_per_step": 2.06, ...}}`. After each point sweep.json
is replaced as a whole, so a sweep that was stopped goes on behind its last point, and one to which thresholds or block
sizes were added decodes only what is missing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from megatron_opdlm.config.schema import RolloutConfig, SweepConfig
from megatron_opdlm.evaluation.results import write_atomically
from megatron_opdlm.evaluation.sweep_report import draw_sweep, sweep_table

Score = Callable[[RolloutConfig], dict[str, dict[str, float]]]
"""From decoding settings to the scores of each task; called by all ranks, which get the same accuracies.

Of the scores `accuracy` and `tokens_per_step` are needed; `sweep_report.COLUMNS` has what else is shown."""

SWEPT = ("block_size", "denoising_steps_per_block", "remasking_strategy", "dynamic_threshold")
"""The settings of `rollout` in which the points of a sweep may differ."""


def swept_rollouts(sweep: SweepConfig, rollout: RolloutConfig) -> list[RolloutConfig]:
    """The settings of every point: by block size, then by threshold, both rising."""
    return [
        dataclasses.replace(
            rollout,
            block_size=block_size,
            denoising_steps_per_block=block_size,
            remasking_strategy="low_confidence_dynamic",
            dynamic_threshold=threshold,
        )
        for block_size in sorted(sweep.block_sizes or [rollout.block_size])
        for threshold in sorted(sweep.thresholds or [rollout.dynamic_threshold])
    ]


class Sweep:
    """A sweep on this rank, with the points that an earlier run of it has done. All ranks must make one.

    `subject` says in JSON what is decoded (which student, which tasks); it is stored beside the points.

    Raises:
        ValueError: the folder holds a sweep of another subject, or one that differs in more than what is swept.
    """

    def __init__(
        self, score: Score, rollouts: list[RolloutConfig], folder: Path, subject: dict, show_progress: bool = False
    ) -> None:
        self.score, self.rollouts, self.folder, self.subject = score, rollouts, folder, subject
        self.hide_progress = not (show_progress and dist.get_rank() == 0)
        self.points = self._points_found()

    def run(self) -> list[dict]:
        """Decodes what is missing and writes table and plot. All ranks must call it, and get all points of the folder.

        A point is `{"rollout": its settings, "tasks": what `score` gave}`.
        """
        done = [point["rollout"] for point in self.points]
        missing = [rollout for rollout in self.rollouts if dataclasses.asdict(rollout) not in done]
        with tqdm(
            total=len(self.rollouts),
            initial=len(self.rollouts) - len(missing),
            desc="sweep",
            unit=" points",
            disable=self.hide_progress,
        ) as bar:
            for rollout in missing:
                bar.set_postfix_str(f"blocks of {rollout.block_size}, threshold {rollout.dynamic_threshold:g}")
                self.points.append({"rollout": dataclasses.asdict(rollout), "tasks": self.score(rollout)})
                self.points.sort(key=_place)
                self._write()
                bar.update()
        self._report()
        return self.points

    def _points_found(self) -> list[dict]:
        """All ranks take what the first rank reads."""
        path = self.folder / "sweep.json"
        found = [path.read_text(encoding="utf-8") if dist.get_rank() == 0 and path.is_file() else None]
        dist.broadcast_object_list(found, src=0)
        (text,) = found
        if text is None:
            return []
        try:
            stored = json.loads(text)
            subject, points = stored["subject"], stored["points"]
            settings = [_common(point["rollout"]) for point in points]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not what a sweep has written ({error!r}); remove it") from error
        self._check_same(path, subject, settings)
        return points

    def _check_same(self, path: Path, subject: dict, settings: list[dict]) -> None:
        """ValueError unless the points that were found belong into one picture with those asked for."""
        wanted_settings = _common(dataclasses.asdict(self.rollouts[0]))
        for found, wanted in [(subject, self.subject), *((some, wanted_settings) for some in settings)]:
            for name in found | wanted:
                if found.get(name) != wanted.get(name):
                    raise ValueError(
                        f"evaluation.output ({self.folder}) holds a sweep with another {name} "
                        f"({found.get(name)} instead of {wanted.get(name)}); name another folder or remove {path.name}"
                    )

    def _write(self) -> None:
        if dist.get_rank() == 0:
            self.folder.mkdir(exist_ok=True)
            text = json.dumps({"subject": self.subject, "points": self.points}, indent=1) + "\n"
            write_atomically(self.folder / "sweep.json", text)

    def _report(self) -> None:
        if dist.get_rank() == 0:
            write_atomically(self.folder / "sweep.md", sweep_table(self.points, self.subject))
            draw_sweep(self.points, self.folder / "sweep.png")


def _place(point: dict) -> tuple[int, float]:
    return point["rollout"]["block_size"], point["rollout"]["dynamic_threshold"]


def _common(rollout: dict) -> dict:
    return {name: value for name, value in rollout.items() if name not in SWEPT}
