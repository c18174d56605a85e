"""What a model's folder says about how it decodes, so that nobody has to repeat it.

    settings_of_checkpoint("runs/mine")         # {"rollout.block_size": 4, "precision.dtype": "bfloat16", ...}
    settings_of_hf("student")                   # what of this stands in its config.json and generation_config.json

A checkpoint of a run has the run's `config.yaml` beside it, of which the settings in `INHERITED` count; layout, memory
and the number of responses are matters of the machine and of the moment.
"""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import Config
from megatron_opdlm.config.settings import SETTINGS

INHERITED = (
    "student.mask_token",
    "student.transformer",
    "precision.dtype",
    "data.apply_chat_template",
    "data.enable_thinking",
    "rollout.block_size",
    "rollout.denoising_steps_per_block",
    "rollout.remasking_strategy",
    "rollout.dynamic_threshold",
    "rollout.entropy_bound",
    "rollout.logit_shift",
    "rollout.temperature",
    "rollout.top_k",
    "rollout.top_p",
    "rollout.max_new_tokens",
    "rollout.max_new_tokens_by_domain",
    "rollout.stop_token_ids",
)
"""What of a run's settings holds for its checkpoints too."""
KEYS_OF_HF = {
    "config.json": {"block_size": "rollout.block_size", "logit_shift": "rollout.logit_shift"},
    "generation_config.json": {
        "block_length": "rollout.block_size",
        "denoising_steps": "rollout.denoising_steps_per_block",
        "remasking_strategy": "rollout.remasking_strategy",
        "dynamic_threshold": "rollout.dynamic_threshold",
        "eb_threshold": "rollout.entropy_bound",
    },
}
"""File of a Hugging Face folder -> key -> setting; the keys are those of models of SDAR's kind."""


def checkpoint_folder(folder: str) -> Path:
    """Of a run, the folder with its checkpoints; any other folder is itself."""
    checkpoints = Path(folder) / "checkpoints"
    return checkpoints if checkpoints.is_dir() else Path(folder)


def settings_of_checkpoint(folder: str) -> dict[str, Any]:
    """By dotted name. ValueError if there is no such folder, or its `config.yaml` is malformed."""
    from megatron_opdlm.checkpointing.folders import ASSETS, newest_checkpoint

    _check_folder("--checkpoint", folder)
    path = checkpoint_folder(folder)
    path = newest_checkpoint(path) or path
    if not (path / "config.yaml").is_file():
        return settings_of_hf(str(path / ASSETS)) if (path / ASSETS).is_dir() else {}
    config = load_config(["--config", str(path / "config.yaml")])
    return {name: _value(config, name) for name in INHERITED}


def settings_of_hf(folder: str) -> dict[str, Any]:
    """By dotted name. ValueError if there is no such folder, or a key has a value that its setting cannot have.

    What else is wrong with its files shows when it is opened.
    """
    _check_folder("--hf", folder)
    found = {}
    for file, keys in KEYS_OF_HF.items():
        values = _read_json(Path(folder) / file)
        for key, name in keys.items():
            if values.get(key) is None:
                continue
            _check_value(Path(folder) / file, key, values[key], name)
            found[name] = values[key]
    dtypes = _read_json(Path(folder) / "config.json")
    dtype = dtypes.get("dtype") or dtypes.get("torch_dtype")
    if dtype in typing.get_args(SETTINGS["precision.dtype"].type):
        found["precision.dtype"] = dtype
    if "rollout.block_size" in found:  # a token a step, unless the folder says something else
        found.setdefault("rollout.denoising_steps_per_block", found["rollout.block_size"])
    return found


def _check_folder(flag: str, folder: str) -> None:
    if not Path(folder).is_dir():
        raise ValueError(f"{flag} ({folder}) is not a folder")


def _check_value(path: Path, key: str, value: Any, name: str) -> None:
    setting = SETTINGS[name]
    choices = typing.get_args(setting.type)
    kinds = {int: (int,), float: (int, float)}.get(setting.type, ())
    if value not in choices if choices else type(value) not in kinds:
        raise ValueError(f"{path}: {key} ({value}) must be {setting.rule}")


def _read_json(path: Path) -> dict:
    """Nothing where it is no JSON object: who opens the model says so."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _value(config: Config, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)
