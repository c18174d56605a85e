"""A sweep's points, its files, and its going on after a stop; scores follow from the settings by arithmetic."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_opdlm.config.schema import RolloutConfig, SweepConfig
from megatron_opdlm.evaluation import sweep_report
from megatron_opdlm.evaluation.sweep import Sweep, swept_rollouts

pytestmark = pytest.mark.usefixtures("world_of_one")

SUBJECT = {"student": "runs/mine", "tasks": {"sums.jsonl": "100"}}
GREEDY = RolloutConfig(temperature=0.0, max_new_tokens=28)


def score(rollout: RolloutConfig) -> dict[str, dict[str, float]]:
    speed = rollout.block_size * (1.5 - rollout.dynamic_threshold)
    return {"sums.jsonl": {"accuracy": 1 / speed, "standard_error": 0.05, "tokens_per_step": speed, "seconds": 2.0}}


class Scored:
    """`score`, noting what it was asked for; ends the run at the call numbered `ends_at`."""

    def __init__(self, ends_at: int | None = None) -> None:
        self.asked: list[tuple[int, float]] = []
        self.ends_at = ends_at

    def __call__(self, rollout: RolloutConfig) -> dict[str, dict[str, float]]:
        if len(self.asked) == self.ends_at:
            raise KeyboardInterrupt
        self.asked.append((rollout.block_size, rollout.dynamic_threshold))
        return score(rollout)


def rollouts(thresholds: list[float], block_sizes: list[int], base: RolloutConfig = GREEDY) -> list[RolloutConfig]:
    return swept_rollouts(SweepConfig(thresholds=thresholds, block_sizes=block_sizes), base)


def pairs(points: list[dict]) -> list[tuple[int, float]]:
    return [(point["rollout"]["block_size"], point["rollout"]["dynamic_threshold"]) for point in points]


def test_every_threshold_is_paired_with_every_block_size_which_is_also_the_number_of_steps():
    found = [(r.block_size, r.denoising_steps_per_block, r.dynamic_threshold) for r in rollouts([1.0, 0.7], [8, 4])]
    assert found == [(4, 4, 0.7), (4, 4, 1.0), (8, 8, 0.7), (8, 8, 1.0)]


def test_what_is_not_swept_is_as_the_rollout_says_and_the_strategy_has_a_threshold():
    base = RolloutConfig(remasking_strategy="sequential", dynamic_threshold=0.8, block_size=2, temperature=0.0)
    (only,) = rollouts([0.5], [], dataclasses.replace(base, denoising_steps_per_block=1))
    changed = {"remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 0.5, "denoising_steps_per_block": 2}
    assert only == dataclasses.replace(base, **changed)
    (other,) = rollouts([], [8], base)
    assert (other.block_size, other.denoising_steps_per_block, other.dynamic_threshold) == (8, 8, 0.8)


def test_a_sweep_writes_each_points_settings_and_scores(tmp_path):
    folder = tmp_path / "sweep"
    points = Sweep(score, rollouts([0.5, 1.0], [4, 8]), folder, SUBJECT).run()
    stored = json.loads((folder / "sweep.json").read_text())
    assert stored == {"subject": SUBJECT, "points": points}
    assert pairs(points) == [(4, 0.5), (4, 1.0), (8, 0.5), (8, 1.0)]
    assert [point["tasks"]["sums.jsonl"]["tokens_per_step"] for point in points] == [4.0, 2.0, 8.0, 4.0]
    assert points[0]["rollout"] == dataclasses.asdict(rollouts([0.5], [4])[0])
    assert sorted(path.name for path in folder.iterdir()) == ["sweep.json", "sweep.md", "sweep.png"]


@pytest.mark.parametrize("ends_at", range(4))
def test_a_sweep_that_was_stopped_goes_on_and_decodes_nothing_twice(tmp_path, ends_at):
    wanted, before, after = rollouts([0.5, 1.0], [4, 8]), Scored(ends_at), Scored()
    with pytest.raises(KeyboardInterrupt):
        Sweep(before, wanted, tmp_path, SUBJECT).run()
    points = Sweep(after, wanted, tmp_path, SUBJECT).run()
    assert before.asked + after.asked == [(4, 0.5), (4, 1.0), (8, 0.5), (8, 1.0)]
    assert points == Sweep(score, wanted, tmp_path / "whole", SUBJECT).run()
    for name in ("sweep.json", "sweep.md", "sweep.png"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_kill_while_a_point_is_written_leaves_the_points_before_it(tmp_path, monkeypatch):
    def interrupted(path: Path, text: str, **_) -> None:
        path.write_bytes(text.encode()[: len(text) // 2])
        raise KeyboardInterrupt

    Sweep(score, rollouts([0.5], [4]), tmp_path, SUBJECT).run()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", interrupted)
        Sweep(score, rollouts([0.5, 1.0], [4]), tmp_path, SUBJECT).run()
    after = Scored()
    assert pairs(Sweep(after, rollouts([0.5, 1.0], [4]), tmp_path, SUBJECT).run()) == [(4, 0.5), (4, 1.0)]
    assert after.asked == [(4, 1.0)]


def test_points_can_be_added_to_a_sweep(tmp_path):
    Sweep(score, rollouts([1.0], [8]), tmp_path, SUBJECT).run()
    more = Scored()
    points = Sweep(more, rollouts([0.5, 1.0], [4, 8]), tmp_path, SUBJECT).run()
    assert (8, 1.0) not in more.asked and len(more.asked) == 3
    assert pairs(points) == [(4, 0.5), (4, 1.0), (8, 0.5), (8, 1.0)]


@pytest.mark.parametrize(
    ("subject", "base", "named"),
    [
        (SUBJECT | {"student": "runs/other"}, GREEDY, r"another student \(runs/mine instead of runs/other\)"),
        (SUBJECT, dataclasses.replace(GREEDY, temperature=1.0), r"another temperature \(0\.0 instead of 1\.0\)"),
        (SUBJECT, dataclasses.replace(GREEDY, max_new_tokens=64), r"another max_new_tokens \(28 instead of 64\)"),
    ],
)
def test_points_of_something_else_are_not_mixed_in(tmp_path, subject, base, named):
    Sweep(score, rollouts([1.0], [4]), tmp_path, SUBJECT).run()
    with pytest.raises(ValueError, match=f"evaluation.output .* holds a sweep with {named}"):
        Sweep(score, rollouts([0.5], [4], base), tmp_path, subject)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"subject": {}, "points": [{}]}', '{"subject": {}, "points": 3}']
)
def test_a_file_that_no_sweep_has_written_is_refused_by_name(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.json is not what a sweep has written .* remove it"):
        Sweep(score, rollouts([1.0], [4]), tmp_path, SUBJECT)


def test_the_table_has_a_row_per_point_and_a_column_per_score_that_there_is(tmp_path):
    points = Sweep(score, rollouts([0.5, 1.0], [4]), tmp_path, SUBJECT).run()
    table = sweep_report.sweep_table(points, SUBJECT).splitlines()
    assert table[table.index("## sums.jsonl") + 2 :] == [
        "| block size | threshold | accuracy | standard error | tokens per step | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 4 | 0.5 | 0.250 | 0.050 | 4.00 | 2.0 |",
        "| 4 | 1 | 0.500 | 0.050 | 2.00 | 2.0 |",
    ]
    assert "- student: runs/mine" in table and "- tasks: sums.jsonl 100" in table
    assert "temperature 0, top-k 0, top-p 1, at most 28 tokens" in "\n".join(table)


def test_the_picture_has_a_line_per_block_size_and_a_labelled_point_per_threshold(tmp_path):
    from matplotlib.figure import Figure

    points = Sweep(score, rollouts([0.5, 1.0], [4, 8]), tmp_path, SUBJECT).run()
    axes = Figure().subplots()
    sweep_report._draw_task(axes, points, "sums.jsonl")
    drawn = [(bar.get_label(), bar.lines[0].get_xydata().tolist()) for bar in axes.containers]
    assert drawn == [("blocks of 4", [[4.0, 0.25], [2.0, 0.5]]), ("blocks of 8", [[8.0, 0.125], [4.0, 0.25]])]
    assert [label.get_text() for label in axes.texts] == ["0.5", "1", "0.5", "1"]
    assert len({bar.lines[0].get_color() for bar in axes.containers}) == 2
    assert len({bar.lines[0].get_marker() for bar in axes.containers}) == 2
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_standard_error_is_that_of_a_share():
    from megatron_opdlm.evaluation.scoring import _scores

    record = {"num_tokens": 6, "num_steps": 3, "stop_reason": "end_token"}
    scores = _scores([record | {"score": 1.0}] * 3 + [record | {"score": 0.5}])
    assert (scores["accuracy"], scores["tokens_per_step"]) == (0.75, 2.0)
    assert scores["standard_error"] == pytest.approx(0.21650635)  # sqrt(3/4 x 1/4 / 4)
