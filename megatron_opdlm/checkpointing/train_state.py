"""Everything a run needs to go on as if it had not stopped: weights, optimizer, schedule, data order, counters.

Random numbers need no state: each is drawn from a generator seeded by the run's seed, the step and the prompt.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opdlm.checkpointing.distributed import METADATA, agree, load_checkpoint
from megatron_opdlm.checkpointing.folders import (
    ASSETS,
    checkpoints,
    first_sound,
    point_to_best,
    remove_old_checkpoints,
)
from megatron_opdlm.checkpointing.manifest import check_complete
from megatron_opdlm.checkpointing.student_and_teacher import StudentSource
from megatron_opdlm.config.load import save_config
from megatron_opdlm.config.schema import Config, Verification
from megatron_opdlm.models.pipeline import PipelineModel

logger = logging.getLogger(__name__)

PROGRESS = "progress"


def save_train_state(
    save: Callable[..., None],
    folder: Path,
    model: PipelineModel,
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
    progress: dict,
    source: StudentSource,
    config: Config,
    best_step: int | None = None,
) -> None:
    """Writes a checkpoint that `load_train_state` and the conversion to Hugging Face read. All ranks must call it.

    `save` is `save_checkpoint` or the `save` of `BackgroundSaves`. Once the checkpoint is in place, `best` beside it
    becomes that of `best_step`, which may be this one, and those beyond `checkpoint.keep` are removed. `progress` is
    the same on all ranks: plain numbers and the `state_dict`s of the schedule and the prompt stream.
    """

    def write_assets(partial: Path) -> None:
        source.write_assets(partial / ASSETS)
        save_config(config, partial / "config.yaml")

    def put_in_order() -> None:
        if best_step is not None:
            point_to_best(folder.parent, best_step)
        remove_old_checkpoints(folder.parent, config.checkpoint.keep)

    state = _sharded_state(model, optimizer, groups, is_loading=False)
    save(folder, state | {PROGRESS: progress}, write_assets, put_in_order)


def load_newest_train_state(
    directory: Path,
    verify: Verification,
    model: PipelineModel,
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
) -> tuple[Path, dict] | None:
    """Loads the newest good checkpoint of a run: its folder and `progress`; None if there is none.

    All ranks must call it. ValueError if that checkpoint is of another model.
    """
    folder = newest_sound_checkpoint(directory, verify)
    if folder is None:
        return None
    try:
        return folder, load_train_state(folder, model, optimizer, groups)
    except ValueError as error:
        # Which of the two it is, damaged shards or another model, the hashes tell.
        sound = folder if verify == "hashes" else newest_sound_checkpoint(directory, "hashes")
        if sound in (folder, None):
            raise
        logger.warning("%s; going on from %s instead", error, sound)
        return sound, load_train_state(sound, model, optimizer, groups)


def newest_sound_checkpoint(directory: Path, verify: Verification) -> Path | None:
    """`newest_checkpoint` for all ranks, each of which reads its share of the files. All must call it.

    They take the checkpoints that rank 0 finds: shared file systems are not always of one mind.
    """
    found = [checkpoints(directory) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(found, src=0)
    share = slice(dist.get_rank(), None, dist.get_world_size())
    return first_sound(found[0], lambda folder: agree(lambda: check_complete(folder, verify, share)))


def load_train_state(
    folder: Path, model: PipelineModel, optimizer: MegatronOptimizer, groups: ProcessGroupCollection
) -> dict:
    """Fills model and optimizer and returns `progress`. All ranks must call it. ValueError if the folder is damaged."""
    state = load_checkpoint(folder, _sharded_state(model, optimizer, groups, is_loading=True))
    # After `_sharded_state`: where part of the optimizer is on the CPU, Megatron makes room for its state by a step.
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(_optimizer_state(optimizer, state["optimizer"]))
    _forget_loaded_step(optimizer)
    return state[PROGRESS]


def _forget_loaded_step(optimizer: MegatronOptimizer) -> None:
    """Where part of the optimizer is on the CPU, lets the part on the GPU count on from the step it was loaded with.

    Before each step Megatron copies the settings of the whole to the parts, and a number of steps would be among them.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            for group in part.optimizer.param_groups:
                group.pop("step", None)


def _optimizer_state(optimizer: MegatronOptimizer, loaded: dict) -> dict:
    """What a checkpoint of any layout says, in the form that this run's optimizer takes.

    Megatron gives experts that ranks share an optimizer of their own. The states of several optimizers are numbered,
    that of a single one stands by itself; the tensors are the same. Besides them only the number of steps is taken:
    the rest of what Megatron stores are settings, which a resumed run may have changed.
    """
    stored = loaded if "optimizer" in loaded else loaded[0]
    (num_steps,) = {group["step"] for group in stored["optimizer"]["param_groups"] if "step" in group}
    parts = optimizer.chained_optimizers
    states = []
    for index, part in enumerate(parts):
        state = part.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = num_steps
        tensors = loaded if len(parts) == 1 else loaded[index]
        kind = METADATA["distrib_optim_sharding_type"]
        states.append(state | {"param_state": tensors["param_state"], "param_state_sharding_type": kind})
    return states[0] if len(parts) == 1 else dict(enumerate(states))


def _sharded_state(
    model: PipelineModel, optimizer: MegatronOptimizer, groups: ProcessGroupCollection, is_loading: bool
) -> dict:
    metadata = METADATA | {"dp_cp_group": groups.dp_cp}
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    with _old_objects_left_alone():
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    _leave_out_classes(state["optimizer"])
    return state


def _leave_out_classes(state: dict) -> None:
    """Takes the classes of optimizers out of the settings saved, in place: `torch.load` would refuse them."""
    for part in (state,) if "optimizer" in state else state.values():
        for group in part["optimizer"]["param_groups"]:
            for name in [name for name, value in group.items() if isinstance(value, type)]:
                del group[name]


@contextlib.contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Megatron-Core collects garbage here, for runs that switched the collector off: 0.2 s over a process's objects."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
