"""Both models of a run, from whatever folders the recipe names to filled Megatron models on this rank.

    source = open_student(config.student)                 # config and tokenizer; no weights yet
    teacher_source = open_teacher(config.teacher, source)
    num_rows = padded_vocab_size(config, source.architecture, teacher_source.architecture)
    student = build_student(source, config, groups, num_rows)
    teacher = build_teacher(teacher_source, config, groups, num_rows)

The student's architecture is its source's plus a mask token. Both models pad their vocabulary to the same number of
rows, so that their tensor-parallel shards hold the same tokens.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opdlm.checkpointing.hf_folder import copy_assets
from megatron_opdlm.checkpointing.pretrained import Pretrained, open_pretrained
from megatron_opdlm.config.schema import Config, StudentConfig, TeacherConfig
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.data.tokenizer import add_mask_token, check_same_tokenizer, end_token_ids, load_tokenizer
from megatron_opdlm.models.attention.backend import AttentionCase, build_backend
from megatron_opdlm.models.attention.core_attention import BlockDiffusionCoreAttention, CausalCoreAttention
from megatron_opdlm.models.build import build_model, choose_layers
from megatron_opdlm.models.fp8 import check_fp8
from megatron_opdlm.models.lora import add_adapters, check_lora
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.models.qwen3 import DTYPES, Qwen3Architecture, read_config_json
from megatron_opdlm.parallel.device import device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StudentSource:
    """Where the student comes from, and what the mask token makes of it."""

    pretrained: Pretrained
    architecture: Qwen3Architecture
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens

    def write_assets(self, folder: Path) -> None:
        """Config, generation config and tokenizer of the student, mask token included."""
        copy_assets(self.pretrained.assets, folder)
        values = read_config_json(folder)
        values |= {"vocab_size": self.architecture.vocab_size, "mask_token_id": self.architecture.mask_token_id}
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        self.tokenizer.save_pretrained(folder)


def open_student(student: StudentConfig, stop_token_ids: list[int] | None = None) -> StudentSource:
    """Reads the student's config and tokenizer; adds the mask token. ValueError names what does not fit."""
    setting, folder = _source(student, "student")
    pretrained = open_pretrained(folder, setting)
    tokenizer = load_tokenizer(pretrained.assets)
    mask_token_id = pretrained.architecture.mask_token_id
    if mask_token_id is None:
        if pretrained.architecture.is_block_diffusion and student.mask_token not in tokenizer.get_vocab():
            raise ValueError(
                f"student.mask_token ({student.mask_token}) must be the mask token that {folder} was trained with; its "
                "tokenizer has no such token"
            )
        mask_token_id = add_mask_token(tokenizer, student.mask_token)
    architecture = pretrained.architecture.with_mask_token(mask_token_id)
    ends = dict.fromkeys([*end_token_ids(tokenizer, pretrained.assets), *(stop_token_ids or [])])
    for token_id in ends:
        if not 0 <= token_id < architecture.vocab_size or token_id == mask_token_id:
            raise ValueError(
                f"end token {token_id} (of {pretrained.assets} or rollout.stop_token_ids) must be a token that the "
                f"student can write: below {architecture.vocab_size} and not the mask token"
            )
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends))
    special = SpecialTokens(architecture.vocab_size, mask_token_id, tuple(ends), pad_token_id)
    return StudentSource(pretrained, architecture, tokenizer, special)


def open_teacher(teacher: TeacherConfig, student: StudentSource) -> Pretrained:
    """Reads the teacher's config and checks that its tokenizer is the student's. ValueError names what differs."""
    pretrained = open_autoregressive(teacher)
    mask_token = student.tokenizer.convert_ids_to_tokens(student.special.mask_token_id)
    check_same_tokenizer(student.tokenizer, load_tokenizer(pretrained.assets), mask_token)
    return pretrained


def open_autoregressive(teacher: TeacherConfig) -> Pretrained:
    """Reads the config of a teacher that stands alone. ValueError if it is no autoregressive model."""
    setting, folder = _source(teacher, "teacher")
    pretrained = open_pretrained(folder, setting)
    check_autoregressive(pretrained.architecture, setting, folder)
    return pretrained


def check_autoregressive(architecture: Qwen3Architecture, setting: str, folder: str) -> None:
    """ValueError for a model that cannot say what comes after a prefix, as a teacher must."""
    if architecture.is_block_diffusion:
        raise ValueError(
            f"{setting} ({folder}) is a block-diffusion model (its model_type is SDAR's): it can be a student, but a "
            "teacher must be autoregressive"
        )


def padded_vocab_size(config: Config, *architectures: Qwen3Architecture) -> int:
    """Embedding rows that hold every architecture's vocabulary, the same number on each tensor-parallel rank."""
    parallel = config.parallel
    return max(
        architecture.padded_vocab_size(parallel.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size)
        for architecture in architectures
    )


def build_student(
    source: StudentSource, config: Config, groups: ProcessGroupCollection, num_rows: int
) -> PipelineModel:
    """The student with its weights. All ranks must call it. `num_rows` is `padded_vocab_size`.

    ValueError if this machine does not have the attention or the FP8 asked for, or the model cannot have the adapters.
    """
    overrides, recipe = config.student.transformer, config.precision.fp8
    check_fp8("precision.fp8", recipe, source.architecture, config.parallel, transformer_impl=choose_layers(overrides))
    check_lora(config.lora, source.architecture, transformer_impl=choose_layers(overrides))
    core_attention = functools.partial(
        BlockDiffusionCoreAttention,
        backend=build_backend(config.attention.backend, _attention_case(source.architecture, config)),
        block_size=config.rollout.block_size,
    )
    model = build_model(
        source.architecture,
        core_attention,
        parallel=config.parallel,
        dtype=config.precision.dtype,
        padded_vocab_size=num_rows,
        overrides=overrides,
        fp8_recipe=recipe,
        fp8_attention=config.attention.fp8,
        recompute=config.training.recompute,
    )
    source.pretrained.load_into(model, groups, source.architecture)
    if config.lora.rank:
        add_adapters(model, config.lora, config.training.seed)
    return model


def build_teacher(source: Pretrained, config: Config, groups: ProcessGroupCollection, num_rows: int) -> PipelineModel:
    """The frozen teacher with its weights. All ranks must call it. `num_rows` is `padded_vocab_size`.

    ValueError if this machine does not have the FP8 asked for.
    """
    overrides, recipe = config.teacher.transformer, config.precision.teacher_fp8
    check_fp8(
        "precision.teacher_fp8", recipe, source.architecture, config.parallel, transformer_impl=choose_layers(overrides)
    )
    model = build_model(
        source.architecture,
        CausalCoreAttention,
        parallel=config.parallel,
        dtype=config.precision.dtype,
        padded_vocab_size=num_rows,
        # Transformer Engine would keep the FP8 copies of the weights on the GPU.
        overrides={"disable_parameter_transpose_cache": config.teacher.offload} | overrides,
        fp8_recipe=recipe,
    )
    source.load_into(model, groups, source.architecture)
    model.freeze()
    return model.move_to_host() if config.teacher.offload else model


def _attention_case(architecture: Qwen3Architecture, config: Config) -> AttentionCase:
    device_type = device().type
    return AttentionCase(
        device_type=device_type,
        compute_capability=torch.cuda.get_device_capability() if device_type == "cuda" else None,
        dtype=DTYPES[config.precision.dtype],
        head_dim=architecture.head_dim,
        kernel=config.attention.kernel,
        fp8=config.attention.fp8,
        fp8_recipe=config.precision.fp8,
    )


def _source(model: StudentConfig | TeacherConfig, section: str) -> tuple[str, str]:
    """The setting that names the folder, and the folder."""
    if (model.hf is None) == (model.checkpoint is None):
        raise ValueError(f"give either {section}.hf or {section}.checkpoint")
    return (f"{section}.hf", model.hf) if model.hf is not None else (f"{section}.checkpoint", model.checkpoint)
