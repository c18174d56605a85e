"""What whoever decodes with an exported student has to know, and where it is recorded.

    serving = read_serving(Path("runs/mine/checkpoints/step_00000480"), {"dynamic_threshold": 0.8})
    serving.mask_token_id, serving.rollout.block_size, serving.origin

What is given counts first, then the `rollout` section of the `config.yaml` that a run writes beside its checkpoint,
then what an earlier export left in the assets of the model that was converted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_opdlm.checkpointing.folders import ASSETS
from megatron_opdlm.checkpointing.pretrained import RUN_CONFIG
from megatron_opdlm.config.check import check_rollout
from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.data.tokenizer import end_token_ids, load_tokenizer
from megatron_opdlm.models.qwen3 import read_architecture, read_config_json

IN_CONFIG = {"block_size": "block_size", "logit_shift": "logit_shift"}
"""Setting of `rollout` -> its key in config.json."""
IN_GENERATION_CONFIG = {
    "block_size": "block_length",
    "denoising_steps_per_block": "denoising_steps",
    "remasking_strategy": "remasking_strategy",
    "dynamic_threshold": "dynamic_threshold",
    "entropy_bound": "eb_threshold",
}
"""Setting of `rollout` -> its key in generation_config.json."""
SETTINGS = (*IN_GENERATION_CONFIG, "logit_shift", "stop_token_ids")
"""The settings of `rollout` that may be given."""


@dataclass(frozen=True)
class Serving:
    """How a student is decoded by default."""

    mask_token_id: int
    end_token_ids: tuple[int, ...]
    """Each of them ends a response; the tokenizer's own is the first."""
    rollout: RolloutConfig
    origin: str
    """Where the settings are from, in words."""


def read_serving(folder: Path, given: Mapping[str, Any]) -> Serving | None:
    """Of the model in a Megatron checkpoint; `given` has settings of `rollout` by name.

    None for a model without a mask token, or of which nobody says how it decodes.

    Raises:
        ValueError: a setting breaks its rule, or settings are given for a model without a mask token.
    """
    assets = folder / ASSETS
    architecture = read_architecture(assets)
    if architecture.mask_token_id is None:
        if given:
            raise ValueError(f"rollout.{next(iter(given))} is given, but {folder} has no mask token: it is no student")
        return None
    recorded, origin = _recorded(folder)
    if not recorded and "block_size" not in given:
        if given:
            raise ValueError(f"rollout.block_size must be given: neither {folder} nor its {ASSETS}/ records it")
        return None
    rollout = replace(recorded or RolloutConfig(), **given)
    check_rollout(rollout)
    ends = dict.fromkeys([*end_token_ids(load_tokenizer(assets), assets), *rollout.stop_token_ids])
    for token_id in ends:
        if not 0 <= token_id < architecture.vocab_size or token_id == architecture.mask_token_id:
            raise ValueError(
                f"rollout.stop_token_ids ({token_id}) must be below {architecture.vocab_size} and not the mask token"
            )
    if given:
        origin = f"{', '.join(given)} given at export" + (f", the rest from {origin}" if recorded else "")
    return Serving(architecture.mask_token_id, tuple(ends), rollout, origin)


def _recorded(folder: Path) -> tuple[RolloutConfig | None, str]:
    """What the checkpoint says of decoding, and which file does."""
    if (folder / RUN_CONFIG).is_file():
        return load_config(["--config", str(folder / RUN_CONFIG)]).rollout, f"the run's {RUN_CONFIG}"
    assets = folder / ASSETS
    generation = assets / "generation_config.json"
    by_file = (
        (read_config_json(assets), IN_CONFIG),
        (json.loads(generation.read_text()) if generation.is_file() else {}, IN_GENERATION_CONFIG),
    )
    found = {name: values[key] for values, keys in by_file for name, key in keys.items() if key in values}
    if "block_size" not in found:
        return None, ""
    found.setdefault("denoising_steps_per_block", found["block_size"])
    return replace(RolloutConfig(), **found), "the folder that the checkpoint was converted from"
