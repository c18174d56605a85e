"""Everything a run needs to go on as if it had not stopped: weights, optimizer, schedule, data order, counters.

Random numbers need no state: each is drawn from a generator seeded by the run's seed, the step and the prompt.
"""

from __future__ import annotations

from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opdlm.checkpointing.distributed import ASSETS, METADATA, load_checkpoint, save_checkpoint
from megatron_opdlm.checkpointing.student_and_teacher import StudentSource
from megatron_opdlm.config.load import save_config
from megatron_opdlm.config.schema import Config
from megatron_opdlm.models.build import Qwen3Model

PROGRESS = "progress"
OF_THE_RECIPE = ("max_lr", "min_lr", "betas", "eps")
"""What Megatron stores with the optimizer's state although it is a setting, which a resumed run may have changed."""


def save_train_state(
    folder: Path,
    model: Qwen3Model,
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
    progress: dict,
    source: StudentSource,
    config: Config,
) -> None:
    """Writes a checkpoint that `load_train_state` and the conversion to Hugging Face read. All ranks must call it.

    `progress` is the same on all ranks: plain numbers and the `state_dict`s of the schedule and the prompt stream.
    """

    def write_assets(partial: Path) -> None:
        source.write_assets(partial / ASSETS)
        save_config(config, partial / "config.yaml")

    state = _sharded_state(model, optimizer, groups, is_loading=False)
    save_checkpoint(folder, state | {PROGRESS: progress}, write_assets)


def load_train_state(
    folder: Path, model: Qwen3Model, optimizer: MegatronOptimizer, groups: ProcessGroupCollection
) -> dict:
    """Fills model and optimizer and returns `progress`. All ranks must call it. ValueError if the folder is damaged."""
    recipe = [{name: group[name] for name in OF_THE_RECIPE} for group in optimizer.param_groups]
    state = load_checkpoint(folder, _sharded_state(model, optimizer, groups, is_loading=True))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for group, settings in zip(optimizer.param_groups, recipe, strict=True):
        group.update(settings)
    return state[PROGRESS]


def _sharded_state(
    model: Qwen3Model, optimizer: MegatronOptimizer, groups: ProcessGroupCollection, is_loading: bool
) -> dict:
    metadata = METADATA | {"dp_cp_group": groups.dp_cp}
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state
