"""The model that answers: the student, by block diffusion, or the teacher, one token after the other.

    opened = open_evaluated_model(config)           # tokenizer and sizes; what does not fit is refused before any work
    model = opened.load(groups)                     # weights
    engine = model.engine()                         # a RolloutEngine

Both decode on the same engine: in blocks of one token that the output before predicts, block diffusion is
autoregressive decoding. A Hugging Face folder and a Megatron checkpoint serve alike.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opdlm.checkpointing.pretrained import Pretrained
from megatron_opdlm.checkpointing.student_and_teacher import (
    StudentSource,
    build_student,
    build_teacher,
    open_autoregressive,
    open_student,
    padded_vocab_size,
)
from megatron_opdlm.config.schema import Config, RolloutConfig
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.data.tokenizer import end_token_ids, load_tokenizer
from megatron_opdlm.evaluation.fingerprint import folder_fingerprint, text_fingerprint
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.rollout.engine import RolloutEngine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OpenedModel:
    """What is known of the model before its weights are read."""

    config: Config
    """As given, without FP8, which is for training: decoding runs in `precision.dtype`."""
    source: StudentSource | Pretrained
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    rollout: RolloutConfig
    """How this model decodes: of the student as given, of the teacher autoregressive."""

    @property
    def pretrained(self) -> Pretrained:
        """The folder, opened."""
        return self.source.pretrained if isinstance(self.source, StudentSource) else self.source

    @property
    def folder(self) -> str:
        """Where the weights come from."""
        return str(self.pretrained.folder)

    def fingerprint(self) -> str:
        """Of the weights, the tokenizer and what decides how they are run, but for the `rollout` settings.

        Depends on content alone: a copy of the folder has the same.
        """
        role = self.config.evaluation.role
        transformer = getattr(self.config, role).transformer
        settings = f"{role} {self.config.precision.dtype} {sorted(transformer.items())} {self.config.training.seed}"
        return text_fingerprint(f"{settings} {folder_fingerprint(self.pretrained.folder)}")

    def load(self, groups: ProcessGroupCollection) -> EvaluatedModel:
        """Builds the model and reads its weights. All ranks must call it."""
        build = build_student if isinstance(self.source, StudentSource) else build_teacher
        num_rows = padded_vocab_size(self.config, self.source.architecture)
        return EvaluatedModel(self, build(self.source, self.config, groups, num_rows), groups)


@dataclass(frozen=True)
class EvaluatedModel:
    """The model on its ranks."""

    opened: OpenedModel
    model: PipelineModel
    groups: ProcessGroupCollection

    def engine(
        self, rollout: RolloutConfig | None = None, stop_token_ids: tuple[int, ...] = (), show_progress: bool = False
    ) -> RolloutEngine:
        """An engine with other settings than `opened.rollout`, or further tokens that end a response."""
        special = self.opened.special
        ends = tuple(dict.fromkeys((*special.end_token_ids, *stop_token_ids)))
        special = dataclasses.replace(special, end_token_ids=ends)
        seed = self.opened.config.training.seed
        return RolloutEngine(self.model, rollout or self.opened.rollout, special, seed, self.groups, show_progress)


def open_evaluated_model(config: Config) -> OpenedModel:
    """Reads config and tokenizer of the model of `evaluation.role`. ValueError for a folder that does not fit."""
    config = _without_fp8(config)
    if config.evaluation.role == "student":
        student = open_student(config.student, config.rollout.stop_token_ids)
        return OpenedModel(config, student, student.tokenizer, student.special, config.rollout)
    teacher = open_autoregressive(config.teacher)
    tokenizer = load_tokenizer(teacher.assets)
    ends = dict.fromkeys([*end_token_ids(tokenizer, teacher.assets), *config.rollout.stop_token_ids])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends))
    vocab_size = teacher.architecture.vocab_size
    # It has no mask token: an id behind its vocabulary stands where a position is still to be decoded.
    special = SpecialTokens(vocab_size, vocab_size, tuple(ends), pad)
    return OpenedModel(config, teacher, tokenizer, special, autoregressive(config.rollout))


def autoregressive(rollout: RolloutConfig) -> RolloutConfig:
    """The settings under which the engine decodes one token after the other."""
    return dataclasses.replace(
        rollout, block_size=1, denoising_steps_per_block=1, logit_shift="next_token", remasking_strategy="sequential"
    )


def _without_fp8(config: Config) -> Config:
    return dataclasses.replace(
        config,
        precision=dataclasses.replace(config.precision, fp8="off", teacher_fp8="off"),
        attention=dataclasses.replace(config.attention, fp8=False),
    )
