"""How much of a step is off-policy, and which settings of objectives go together."""

from __future__ import annotations

import pytest

from megatron_opdlm.config.check import check_config
from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import Config, CurriculaConfig, ObjectiveConfig, RolloutConfig
from megatron_opdlm.config.sft_presets import PRESETS, with_preset
from megatron_opdlm.objectives.off_policy import off_policy_fraction_at
from megatron_opdlm.objectives.table import OBJECTIVES


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.8, 0.6, 0.4, 0.0, 0.0]),
        ("cosine", [0.8, 0.8 * 0.853553, 0.4, 0.0, 0.0]),
    ],
)
def test_the_fraction_decays_as_its_shape_says(decay, expected):
    objective = ObjectiveConfig(off_policy_fraction=0.8, off_policy_decay=decay, off_policy_steps=8)
    actual = [off_policy_fraction_at(step, objective, max_steps=100) for step in (0, 2, 4, 8, 9)]
    assert actual == pytest.approx(expected, abs=1e-6)


def test_without_a_number_of_steps_it_decays_over_the_run():
    objective = ObjectiveConfig(off_policy_fraction=1.0, off_policy_decay="linear")
    assert off_policy_fraction_at(25, objective, max_steps=100) == 0.75


SFT, LIFT = {"name": "sft"}, {"name": "lift"}
REFUSED = {
    "objective.off_policy_fraction (1.5) must lie between 0 and 1": {"off_policy_fraction": 1.5},
    "objective.off_policy_steps (0) must be at least 1": {"off_policy_steps": 0},
    "objective.noise_low (0.9) must be over 0 and not above objective.noise_high (0.5)": SFT
    | {"noise_low": 0.9, "noise_high": 0.5},
    "objective.noise_low (0.0) must be over 0": SFT | {"noise_low": 0.0},
    "objective.noise_high (1.5), which is at most 1": SFT | {"noise_high": 1.5},
    "objective.preset (sdar) must be left alone under objective.name (on_policy_distillation)": {"preset": "sdar"},
    "objective.complementary (True) must be left alone under objective.name (lift)": LIFT | {"complementary": True},
    "objective.off_policy_fraction (0.5) must be left alone under objective.name (sft)": SFT
    | {"off_policy_fraction": 0.5},
    "objective.normaliser (masked) must be left alone under objective.preset (sdar)": SFT
    | {"preset": "sdar", "normaliser": "masked"},
    "rollout.logit_shift (none) must be next_token under objective.preset (fast_dllm_v2)": SFT
    | {"preset": "fast_dllm_v2"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_do_not_go_together_are_refused(message):
    with pytest.raises(ValueError) as raised:
        check_config(Config(objective=ObjectiveConfig(**REFUSED[message])), world_size=None)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("message", "sections"),
    [
        ("curricula.length_start (8) must be null under", {"curricula": CurriculaConfig(length_start=8)}),
        (
            "rollout.num_responses_per_prompt (2) must be 1 under",
            {"rollout": RolloutConfig(num_responses_per_prompt=2)},
        ),
    ],
)
def test_settings_of_a_rollout_are_refused_where_there_is_none(message, sections):
    with pytest.raises(ValueError) as raised:
        check_config(Config(objective=ObjectiveConfig(name="sft"), **sections), world_size=None)
    assert message in str(raised.value)


def test_every_preset_and_objective_is_accepted():
    for name, preset in PRESETS.items():
        config = Config(
            objective=ObjectiveConfig(name="sft", preset=name), rollout=RolloutConfig(logit_shift=preset.logit_shift)
        )
        check_config(config, world_size=None)
        assert with_preset(config.objective).normaliser == preset.normaliser
    for name in OBJECTIVES:
        check_config(Config(objective=ObjectiveConfig(name=name)), world_size=None)


def test_a_teacher_is_asked_for_only_where_the_objective_has_one(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    arguments = ["--student.hf", str(tmp_path), "--data.train_files", str(tmp_path / "rows.jsonl")]
    required = ("student", "teacher", "data.train_files")
    for name in ("sft", "lift"):
        assert load_config([*arguments, "--objective.name", name], required=required).teacher.hf is None
    with pytest.raises(ValueError, match=r"give teacher\.hf or teacher\.checkpoint"):
        load_config(arguments, required=required)


def test_only_distillation_needs_a_teacher_and_only_some_objectives_need_responses():
    needs = {
        "distillation": ObjectiveConfig(),
        "teacher's text": ObjectiveConfig(off_policy_fraction=0.5),
        "given text": ObjectiveConfig(off_policy_fraction=0.5, off_policy_source="data"),
        "sft": ObjectiveConfig(name="sft"),
        "lift": ObjectiveConfig(name="lift"),
    }
    assert [name for name, objective in needs.items() if not objective.needs_teacher] == ["sft", "lift"]
    assert [name for name, objective in needs.items() if objective.needs_responses] == ["given text", "sft", "lift"]
