"""How other projects fine-tune block-diffusion models on given responses, as settings; and the rules of `objective`.

    objective = with_preset(config.objective)              # `objective.preset` put in the place of the settings
    check_objective(config.objective, config.rollout, config.curricula)

What each preset says was read off these sources; what they share with our own trainer, and how they
batch and pack, is left out:

- `sdar`: JetAstra/SDAR, `training/model/SDAR-4B-Chat/modeling_sdar.py`. One t per sample, 0.001 + 0.999 u; each
  cross-entropy over t; the sum over the batch's response tokens.
- `fast_dllm_v2`: `modeling.py` of Fast_dLLM_v2 (NVlabs/Fast-dLLM, arXiv 2509.26328), as a public copy has it. One t per
  block, 0.001 + 0.999 u; the sample and its complement; the output before predicts a position; the mean over what is
  masked.
- `dllm`: ZHZisZZ/dllm, `dllm/core/trainers/{mdlm,bd3lm}.py`. As `sdar` (the linear schedule's weight is 1/t), and the
  last block is filled up with end tokens, which are trained.
- `llada2`: inclusionAI/dFactory, `tasks/train_llada2_bd.py` and `configs/sft`. One t per sample between 0.3 and 0.8;
  mean over what is masked. It pads and trains to its longest sequence; here, to the end of the last block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_opdlm.config.method import LogitShift, LossWeight, NoiseLevel, Normaliser
from megatron_opdlm.config.rules import require
from megatron_opdlm.config.schema import CurriculaConfig, ObjectiveConfig, RolloutConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings that a preset decides; those of `objective`, and the shift that it wants of `rollout`."""

    noise_level: NoiseLevel
    noise_low: float = 0.001
    noise_high: float = 1.0
    loss_weight: LossWeight = "none"
    normaliser: Normaliser
    complementary: bool = False
    train_fill: bool = False
    logit_shift: LogitShift = "none"

    def settings(self) -> dict[str, object]:
        """Those of `objective`."""
        return {name: value for name, value in vars(self).items() if name != "logit_shift"}


PRESETS: dict[str, Preset] = {
    "sdar": Preset(noise_level="sequence", loss_weight="1/t", normaliser="tokens"),
    "fast_dllm_v2": Preset(noise_level="block", normaliser="masked", complementary=True, logit_shift="next_token"),
    "dllm": Preset(noise_level="sequence", loss_weight="1/t", normaliser="tokens", train_fill=True),
    "llada2": Preset(noise_level="sequence", noise_low=0.3, noise_high=0.8, normaliser="masked", train_fill=True),
}
"""`objective.preset` -> what it decides."""

SUPERVISED_ONLY = ("preset", "noise_level", "noise_low", "noise_high", "loss_weight", "normaliser", "train_fill")
OFF_POLICY_ONLY = ("off_policy_fraction", "off_policy_decay", "off_policy_steps", "off_policy_source")


def with_preset(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The same settings with the preset's in place; unchanged without one."""
    return objective if objective.preset == "none" else replace(objective, **PRESETS[objective.preset].settings())


def check_objective(objective: ObjectiveConfig, rollout: RolloutConfig, curricula: CurriculaConfig) -> None:
    """ValueError names the setting, its value and the rule."""
    fraction, steps = objective.off_policy_fraction, objective.off_policy_steps
    require(0 <= fraction <= 1, f"objective.off_policy_fraction ({fraction}) must lie between 0 and 1")
    require(steps is None or steps >= 1, f"objective.off_policy_steps ({steps}) must be at least 1")
    low, high = objective.noise_low, objective.noise_high
    require(
        0 < low <= high <= 1,
        f"objective.noise_low ({low}) must be over 0 and not above objective.noise_high ({high}), which is at most 1",
    )
    _check_unused(objective)
    _check_preset(objective, rollout)
    responses, start = rollout.num_responses_per_prompt, curricula.length_start
    require(
        objective.needs_teacher or start is None,
        f"curricula.length_start ({start}) must be null under objective.name ({objective.name}): nothing is rolled out",
    )
    require(
        objective.needs_teacher or responses == 1,
        f"rollout.num_responses_per_prompt ({responses}) must be 1 under objective.name ({objective.name}): a row has "
        "one response",
    )


def _check_unused(objective: ObjectiveConfig) -> None:
    """What the objective has no use for must be left alone."""
    unused = {
        "on_policy_distillation": (*SUPERVISED_ONLY, "complementary"),
        "sft": OFF_POLICY_ONLY,
        "lift": (*OFF_POLICY_ONLY, "preset", "noise_level", "complementary"),
    }[objective.name]
    _refuse_changed(objective, unused, f"objective.name ({objective.name}), which does not use it")


def _check_preset(objective: ObjectiveConfig, rollout: RolloutConfig) -> None:
    if objective.preset == "none":
        return
    preset = PRESETS[objective.preset]
    given_up = [name for name, value in preset.settings().items() if getattr(objective, name) != value]
    _refuse_changed(objective, given_up, f"objective.preset ({objective.preset}), which decides it")
    require(
        rollout.logit_shift == preset.logit_shift,
        f"rollout.logit_shift ({rollout.logit_shift}) must be {preset.logit_shift} under objective.preset "
        f"({objective.preset})",
    )


def _refuse_changed(objective: ObjectiveConfig, names: tuple[str, ...] | list[str], reason: str) -> None:
    default = ObjectiveConfig()
    for name in names:
        value = getattr(objective, name)
        require(value == getattr(default, name), f"objective.{name} ({value}) must be left alone under {reason}")
