"""What an entry point cannot do without: models, files and folders that are given and exist.

check_required(config, ("student", "data.train_files"))

Each thing missing is a ValueError that names the setting.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from megatron_opdlm.config.rules import require
from megatron_opdlm.config.schema import Config, StudentConfig, TeacherConfig


def check_required(config: Config, required: Iterable[str]) -> None:
    """Checks that what an entry point needs is given and exists.

    `required` may name "student" and "teacher" (`hf` or `checkpoint`), "data.train_files", "evaluation.role": the model
    of that role, "evaluation": that and what is to be scored, and "validation": what is scored while training. A
    teacher is not asked for where the objective has none, nor tasks to validate by where `evaluation.interval` is 0.
    """
    for name in required:
        if name == "teacher" and not config.objective.needs_teacher:
            continue
        if name == "validation":
            if config.evaluation.interval:
                require(config.evaluation.files, "give evaluation.files, at least one file")
                _check_files("evaluation.files", config.evaluation.files)
        elif name == "evaluation":
            _check_evaluation(config)
        elif name == "evaluation.role":
            _check_model(config.evaluation.role, getattr(config, config.evaluation.role))
        elif name in ("student", "teacher"):
            _check_model(name, getattr(config, name))
        else:
            require(config.data.train_files, f"give {name}, at least one file")
            _check_files(name, config.data.train_files)


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    require(evaluation.files or evaluation.tasks, "give evaluation.files or evaluation.tasks, at least one of them")
    _check_model(evaluation.role, getattr(config, evaluation.role))
    _check_files("evaluation.files", evaluation.files)
    for folder in evaluation.include_path:
        _check_folder("evaluation.include_path", folder)
    if evaluation.data_dir is not None:
        _check_folder("evaluation.data_dir", evaluation.data_dir)


def _check_model(name: str, model: StudentConfig | TeacherConfig) -> None:
    require(model.hf or model.checkpoint, f"give {name}.hf or {name}.checkpoint")
    _check_folder(f"{name}.hf" if model.hf else f"{name}.checkpoint", model.hf or model.checkpoint)


def _check_files(name: str, files: list[str]) -> None:
    for file in files:
        require(os.path.isfile(file), f"{name}: there is no file {file}")


def _check_folder(name: str, folder: str) -> None:
    require(os.path.isdir(folder), f"{name}: there is no folder {folder}")
