"""Rules of the sections that say what is trained and how: `states`, `curricula`, `lora`. Part of `config.check`."""

from __future__ import annotations

from megatron_opdlm.config.rules import at_least, require
from megatron_opdlm.config.schema import CurriculaConfig, LoraConfig, RolloutConfig, StatesConfig


def check_lora(lora: LoraConfig) -> None:
    """Checks the adapters; what the model has to say to them is in `models.lora`."""
    at_least(0, "lora", rank=lora.rank)
    require(lora.alpha > 0, f"lora.alpha ({lora.alpha}) must be over 0")
    modules = lora.target_modules
    require(modules, "lora.target_modules () must not be empty")
    require(len(set(modules)) == len(modules), f"lora.target_modules ({', '.join(modules)}) must not have one twice")


def check_states(states: StatesConfig) -> None:
    """Checks the choice of states."""
    at_least(1, "states", shrink=states.shrink)
    require(
        states.shrink == 1 or states.selection == "all_steps",
        f"states.shrink ({states.shrink}) needs states.selection ({states.selection}) to be all_steps",
    )


def check_curricula(curricula: CurriculaConfig, rollout: RolloutConfig) -> None:
    """Checks the schedules of length and threshold."""
    at_least(1, "curricula", length_start=curricula.length_start)
    at_least(0, "curricula", length_ramp_steps=curricula.length_ramp_steps)
    _check_threshold(curricula, rollout)


def _check_threshold(curricula: CurriculaConfig, rollout: RolloutConfig) -> None:
    start, strategy = curricula.threshold_start, rollout.remasking_strategy
    hold, ramp = curricula.threshold_hold_steps, curricula.threshold_ramp_steps
    at_least(0, "curricula", threshold_hold_steps=hold, threshold_ramp_steps=ramp)
    require(start is None or 0 <= start <= 1, f"curricula.threshold_start ({start}) must lie between 0 and 1")
    require(
        start is None or strategy == "low_confidence_dynamic",
        f"curricula.threshold_start ({start}) needs rollout.remasking_strategy ({strategy}) to be "
        "low_confidence_dynamic, which alone has a threshold",
    )
