"""The objectives there are, by the names of `objective.name`.

objective = OBJECTIVES[config.objective.name](parts)
"""

from __future__ import annotations

from megatron_opdlm.objectives.lift import Lift
from megatron_opdlm.objectives.objective import Objective
from megatron_opdlm.objectives.on_policy_distillation import OnPolicyDistillation
from megatron_opdlm.objectives.sft import Sft

OBJECTIVES: dict[str, type[Objective]] = {
    "on_policy_distillation": OnPolicyDistillation,
    "sft": Sft,
    "lift": Lift,
}
"""`objective.name` -> its class."""
