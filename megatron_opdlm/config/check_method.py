"""Rules of the sections that say what is trained and how: `lora`, `states`, `curricula`, `divergence`.

Part of `config.check`.
"""

from __future__ import annotations

import math

from megatron_opdlm.config.rules import at_least, require, within
from megatron_opdlm.config.schema import CurriculaConfig, DivergenceConfig, LoraConfig, RolloutConfig, StatesConfig


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


def check_divergence(divergence: DivergenceConfig) -> None:
    at_least(0, "divergence", top_k=divergence.top_k)
    at_least(1, "divergence", chunk_size=divergence.chunk_size)
    within(0, 1, "divergence", reverse_weight=divergence.reverse_weight)
    kind, alpha, tail = divergence.kind, divergence.jsd_alpha, divergence.top_k_tail
    require(0 < alpha < 1, f"divergence.jsd_alpha ({alpha}) must be over 0 and below 1: at both ends JSD is zero")
    require(
        divergence.top_k == 0 or tail != "none" or kind == "forward_kl",
        f"divergence.top_k_tail ({tail}) must be renormalize or bucket under divergence.kind ({kind}): only forward_kl "
        "is defined for a sum that is not normalised",
    )
    _check_target(divergence)


def _check_target(divergence: DivergenceConfig) -> None:
    """The filters on the teacher's distribution. Over a token that they leave no probability reverse KL is infinite."""
    temperature, top_p = divergence.teacher_temperature, divergence.teacher_top_p
    require(
        0 < temperature < math.inf,
        f"divergence.teacher_temperature ({temperature}) must be over 0; for the argmax divergence.teacher_top_k is 1",
    )
    at_least(0, "divergence", teacher_top_k=divergence.teacher_top_k)
    require(0 < top_p <= 1, f"divergence.teacher_top_p ({top_p}) must be over 0 and at most 1")
    within(0, 1, "divergence", teacher_min_p=divergence.teacher_min_p)
    for name, no_filter in (("teacher_top_k", 0), ("teacher_top_p", 1), ("teacher_min_p", 0)):
        value, kind = getattr(divergence, name), divergence.kind
        require(
            value == no_filter or kind in ("forward_kl", "jsd"),
            f"divergence.{name} ({value}) must be {no_filter} under divergence.kind ({kind}): KL(student || teacher) "
            "is infinite where the teacher has no probability",
        )
