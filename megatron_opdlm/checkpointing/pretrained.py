"""A model on disk, be it a Hugging Face folder or a Megatron checkpoint: its shape, its tokenizer, its weights.

source = open_pretrained("Qwen3-0.6B", setting="teacher.hf")
source.architecture, source.assets                      # the folder with config.json and the tokenizer
source.load_into(model, groups, source.architecture)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opdlm.checkpointing.distributed import METADATA, load_checkpoint
from megatron_opdlm.checkpointing.folders import ASSETS, newest_checkpoint
from megatron_opdlm.checkpointing.harmless import check_harmless
from megatron_opdlm.checkpointing.hf_qwen3 import load_hf_weights
from megatron_opdlm.checkpointing.manifest import MANIFEST, check_complete, is_checkpoint
from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import Config
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.models.qwen3 import Qwen3Architecture, read_architecture

RUN_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Pretrained:
    """Where a model's weights and assets lie."""

    folder: Path
    is_megatron: bool
    architecture: Qwen3Architecture

    @property
    def assets(self) -> Path:
        """The folder with `config.json`, `generation_config.json` and the tokenizer."""
        return self.folder / ASSETS if self.is_megatron else self.folder

    def load_into(self, model: PipelineModel, groups: ProcessGroupCollection, architecture: Qwen3Architecture) -> None:
        """Fills this rank's shards. `architecture` is the source's, or the student's made from it.

        All ranks must call it. ValueError if the folder holds adapters alone.
        """
        if read_lora_run(self.folder) is not None:
            raise ValueError(
                f"{self.folder} holds the adapters of a LoRA run, not whole weights; merge them with "
                "tools/convert_megatron_to_hf.py"
            )
        if self.is_megatron:
            state = load_checkpoint(self.folder, {"model": model.sharded_state_dict(metadata=METADATA)})
            model.load_state_dict(state["model"])
        else:
            load_hf_weights(model, self.folder, architecture, groups)


def read_lora_run(folder: Path) -> Config | None:
    """The settings of the LoRA run that wrote a checkpoint; None for any other folder."""
    path = folder / RUN_CONFIG
    if not path.is_file():
        return None
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    return load_config(["--config", str(path)]) if sections.get("lora", {}).get("rank") else None


def open_pretrained(folder: str, setting: str) -> Pretrained:
    """Looks at the folder without reading weights; of a run's `checkpoints/` it takes the newest.

    ValueError names the setting and what is wrong with the folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{setting} ({folder}) is not a folder")
    path = newest_checkpoint(path) or path
    is_megatron = is_checkpoint(path)
    if is_megatron:
        check_complete(path)
        check_harmless(path)
    elif not (path / "config.json").is_file():
        raise ValueError(
            f"{setting} ({folder}) is neither a Hugging Face folder (it has no config.json) "
            f"nor a whole Megatron checkpoint (it has no {MANIFEST})"
        )
    return Pretrained(path, is_megatron, read_architecture(path / ASSETS if is_megatron else path))
