"""A Megatron checkpoint -> a Hugging Face folder that is ready for use: weights, settings, code, model card.

    export_hf(Path("runs/mine/checkpoints"), Path("my-model"), ExportOptions(format="sdar", dtype="bfloat16"))

Everything that can be refused is refused before a weight is read. The folder is filled under another name, read again,
compared with what was meant, and only then gets its name.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_opdlm.checkpointing.conversion import check_absent, write_hf_folder
from megatron_opdlm.checkpointing.folders import PARTIAL, newest_checkpoint
from megatron_opdlm.checkpointing.hf_qwen3 import EMBEDDING, OUTPUT
from megatron_opdlm.checkpointing.manifest import check_complete
from megatron_opdlm.checkpointing.pretrained import open_pretrained
from megatron_opdlm.export.formats import (
    SDAR_MASK_TOKEN_ID,
    Family,
    config_values,
    family_of,
    generation_values,
    sglang_values,
)
from megatron_opdlm.export.model_card import SGLANG_FILE, model_card
from megatron_opdlm.export.run_record import read_run
from megatron_opdlm.export.serving import Serving, read_serving
from megatron_opdlm.export.verification import Digests, check_reloads
from megatron_opdlm.models.qwen3 import Qwen3Architecture, read_config_json

logger = logging.getLogger(__name__)

CODE = Path(__file__).parent / "remote_code"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the folder is to be like."""

    format: str | None = None
    """One of `formats.FORMATS`; None for the one that the model has."""
    with_generate: bool = False
    """Whether model code with a `generate` goes with it. It always does with an SDAR."""
    dtype: str | None = None
    """Of the weights; None for the checkpoint's."""
    max_shard_size: str = "5GB"
    """Of one file of weights."""
    rollout: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `rollout` that count more than recorded ones."""


@dataclass(frozen=True)
class _Plan:
    folder: Path
    architecture: Qwen3Architecture
    family: Family
    serving: Serving | None
    with_code: bool
    max_shard_bytes: int

    @property
    def is_to_untie(self) -> bool:
        """Published SDARs have an output matrix of their own, and SGLang's loader fails without one."""
        return self.family.is_sdar and self.architecture.tie_word_embeddings


def export_hf(checkpoint: Path, output: Path, options: ExportOptions) -> None:
    """Writes the folder `output` of a checkpoint, or of the newest one of a run. One process.

    Raises:
        ValueError: the output exists; the checkpoint is missing or damaged; the format cannot hold the model; nobody
            says how it decodes where that must be known; a setting breaks its rule; the files, read again, differ from
            what was meant.
    """
    check_absent(output)
    plan = _plan(checkpoint, options)
    workshop = output.with_name(output.name + PARTIAL)
    shutil.rmtree(workshop, ignore_errors=True)
    try:
        _fill(workshop, plan, options)
        workshop.rename(output)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    logger.info("wrote %s", output)


def shard_bytes(size: str) -> int:
    """`5GB` -> 5000000000, as Hugging Face counts. ValueError for anything else than a number with KB, MB or GB."""
    found = re.fullmatch(r"(\d+)(KB|MB|GB)", size.upper())
    if not found or int(found[1]) == 0:
        raise ValueError(f"--max-shard-size ({size}) must be a whole number of KB, MB or GB, such as 5GB")
    return int(found[1]) * _UNITS[found[2]]


def _plan(checkpoint: Path, options: ExportOptions) -> _Plan:
    folder = newest_checkpoint(checkpoint) or checkpoint
    check_complete(folder, "hashes")
    pretrained = open_pretrained(str(folder), "--checkpoint")
    family = family_of(read_config_json(pretrained.assets)["model_type"], options.format)
    serving = read_serving(folder, options.rollout)
    if serving is None and (family.is_sdar or options.with_generate):
        wanted = "--format sdar" if family.is_sdar else "--with-generate"
        what = "a mask token" if pretrained.architecture.mask_token_id is None else "--rollout.block_size"
        raise ValueError(f"{wanted} needs {what}: {folder} does not record it")
    if family.is_sdar:
        _check_servable(serving)
    with_code = family.is_sdar or options.with_generate
    return _Plan(folder, pretrained.architecture, family, serving, with_code, shard_bytes(options.max_shard_size))


def _check_servable(serving: Serving) -> None:
    """No server of SDAR shifts logits, and without the shift they are those of other positions."""
    if serving.rollout.logit_shift != "none":
        raise ValueError(
            f"--format sdar cannot hold a student of rollout.logit_shift {serving.rollout.logit_shift}: servers of "
            "SDAR would read its logits at the wrong positions. --with-generate in the other format can decode it"
        )
    if serving.mask_token_id != SDAR_MASK_TOKEN_ID:
        logger.warning(
            "the mask token is %d; SGLang and LMDeploy take %d for the one of any SDAR, so only JetEngine can serve it",
            serving.mask_token_id,
            SDAR_MASK_TOKEN_ID,
        )


def _fill(folder: Path, plan: _Plan, options: ExportOptions) -> None:
    written = Digests()
    write_hf_folder(
        plan.folder,
        folder,
        dtype=options.dtype,
        max_shard_bytes=plan.max_shard_bytes,
        through=lambda tensors: written.note(_for_servers(tensors, plan) if plan.family.is_sdar else tensors),
    )
    values = read_config_json(folder)
    architecture = dataclasses.replace(
        plan.architecture,
        dtype=values["dtype"],
        tie_word_embeddings=plan.architecture.tie_word_embeddings and not plan.is_to_untie,
        is_block_diffusion=plan.family.is_sdar,
    )
    _write_json(folder / "config.json", config_values(values, architecture, plan.family, plan.serving, plan.with_code))
    _write_decoding(folder, plan)
    _write_code(folder, plan)
    card = model_card(plan.family, architecture, plan.serving, read_run(plan.folder), plan.with_code)
    (folder / "README.md").write_text(card, encoding="utf-8")
    written.check(folder)
    check_reloads(folder, architecture, plan.serving)


def _for_servers(tensors: Iterator[tuple[str, torch.Tensor]], plan: _Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """With an output matrix of its own, which does not say the mask token."""
    for name, tensor in tensors:
        yield name, _never_masking(tensor, plan.serving.mask_token_id) if name == OUTPUT[1] else tensor
        if name == EMBEDDING[1] and plan.is_to_untie:
            yield OUTPUT[1], _never_masking(tensor, plan.serving.mask_token_id)


def _never_masking(output_VH: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """The output matrix with the mean of the other rows as the mask token's.

    Rollout and loss take that token's logit for minus infinity, so training leaves it as it happens to be; servers of
    SDAR take it as it is, and would commit mask tokens. A mean of logits is below the largest of them, and (by Jensen's
    inequality) its share of the softmax is at most one in V.
    """
    changed_VH = output_VH.clone()
    others_H = output_VH.sum(dim=0, dtype=torch.float32) - output_VH[mask_token_id].float()
    changed_VH[mask_token_id] = others_H / (len(output_VH) - 1)
    return changed_VH


def _write_decoding(folder: Path, plan: _Plan) -> None:
    if plan.serving is None:
        return
    path = folder / "generation_config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    _write_json(path, generation_values(values, plan.serving))
    if plan.family.is_sdar:
        (folder / SGLANG_FILE).write_text(yaml.safe_dump(sglang_values(plan.serving)))


def _write_code(folder: Path, plan: _Plan) -> None:
    """Model code that came with the folder, of a published SDAR say, would name files and classes that are gone."""
    for pattern in ("modeling_*.py", "configuration_*.py"):
        for path in folder.glob(pattern):
            path.unlink()
    if plan.with_code:
        codes = (plan.family.config_code, plan.family.model_code)
        modules = {code.partition(".")[0] for code in codes if code} | {"modeling_block_diffusion"}
        for module in sorted(modules):
            shutil.copyfile(CODE / f"{module}.py", folder / f"{module}.py")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
