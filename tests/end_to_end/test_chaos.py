"""What a run comes to under kills at random instants: the end it would have had. `chaos.py` is the same by hand."""

from __future__ import annotations

import json

import pytest

from tests.end_to_end import chaos

NUM_ROUNDS = 10


def test_a_run_killed_again_and_again_in_every_phase_ends_as_the_undisturbed_one_with_each_prompt_once_an_epoch(
    tmp_path,
):
    met = chaos.chaos(tmp_path, NUM_ROUNDS, seed=0)
    assert met["rounds"] == NUM_ROUNDS and met["starts"] > met["runs"], "a run went on after a kill"
    assert set(chaos.PHASES) <= set(met["killed_in"]), met


def test_a_run_that_lost_or_repeated_a_step_is_found(tmp_path):
    """So that the claim above can fail: two runs that differ in one prompt, and in one byte."""
    from megatron_opdlm.checkpointing.folders import begin_folder, publish, step_folder

    for run in ("undisturbed", "same", "other prompts", "other state"):
        partial = begin_folder(step_folder(tmp_path / run / "checkpoints", chaos.NUM_STEPS))
        (partial / "__0_0.distcp").write_text("another" if run == "other state" else "state")
        publish(partial)
        order = [prompt % chaos.NUM_PROMPTS for prompt in range(2 * chaos.NUM_PROMPTS)]
        if run == "other prompts":
            order[0], order[1] = order[1], order[0]
        steps = [order[begin : begin + 4] for begin in range(0, len(order), 4)]
        lines = [json.dumps({"step": step, "prompt_ids": ids}) + "\n" for step, ids in enumerate(steps)]
        (tmp_path / run / "audit.jsonl").write_text("".join(lines))
    chaos.check_run(tmp_path / "same", tmp_path / "undisturbed")
    for run in ("other prompts", "other state"):
        with pytest.raises(AssertionError, match=run):
            chaos.check_run(tmp_path / run, tmp_path / "undisturbed")
