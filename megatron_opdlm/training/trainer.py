"""The training loop: get sequences, select states, learn them, save.

    trainer = Trainer(config)
    trainer.run()

A step's random numbers depend on the seed, the step and the prompt alone, so a run that is stopped and resumed goes on
exactly as it would have.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_opdlm.checkpointing.distributed import BackgroundSaves, agree, save_checkpoint
from megatron_opdlm.checkpointing.folders import step_folder
from megatron_opdlm.checkpointing.student_and_teacher import (
    build_student,
    build_teacher,
    open_student,
    open_teacher,
    padded_vocab_size,
)
from megatron_opdlm.checkpointing.train_state import load_newest_train_state, save_train_state
from megatron_opdlm.config.check_architecture import check_experts
from megatron_opdlm.config.load import save_config
from megatron_opdlm.config.schema import Config
from megatron_opdlm.data.prompts import Prompt, read_prompts
from megatron_opdlm.data.sampler import PromptStream
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.models.fp8 import load_scaling_state, scaling_state
from megatron_opdlm.objectives.objective import Parts
from megatron_opdlm.objectives.table import OBJECTIVES
from megatron_opdlm.observability.report import write_report
from megatron_opdlm.observability.stragglers import StragglerWatch
from megatron_opdlm.observability.timers import PhaseTimers
from megatron_opdlm.observability.watchdog import Watchdog
from megatron_opdlm.observability.writers import Writer, build_writers
from megatron_opdlm.parallel.determinism import make_deterministic
from megatron_opdlm.parallel.device import device
from megatron_opdlm.parallel.initialize import control_store, initialize
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard
from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask
from megatron_opdlm.training.balance import balance_rows
from megatron_opdlm.training.curricula import domain_limit, dynamic_threshold_at, max_new_tokens_at
from megatron_opdlm.training.expert_load import ExpertLoad
from megatron_opdlm.training.interruption import Interruption
from megatron_opdlm.training.kept_trajectories import KeptTrajectories
from megatron_opdlm.training.optimizer import learning_rate, make_trainable, parameter_count, wait_for_weights
from megatron_opdlm.training.prompt_audit import PromptAudit
from megatron_opdlm.training.skipped_steps import SkippedSteps, TooManySkippedSteps
from megatron_opdlm.training.step_metrics import StepMetrics
from megatron_opdlm.training.train_step import TrainStep
from megatron_opdlm.training.validation import Validation

logger = logging.getLogger(__name__)


class Trainer:
    """A run on this rank. The constructor reads everything and resumes if there is something to resume from.

    All ranks must make one and call `run`.

    Raises:
        ValueError: what the settings name does not exist or does not fit; raised before anything is written.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        source = open_student(config.student, config.rollout.stop_token_ids)
        teacher_source = open_teacher(config.teacher, source) if config.objective.needs_teacher else None
        architectures = [source.architecture] + ([teacher_source.architecture] if teacher_source else [])
        check_experts(config, *architectures)
        self.prompts = self._read_prompts(source.tokenizer)
        if config.training.deterministic:
            make_deterministic()
        self.groups = initialize(config.parallel, config.training.seed)
        num_rows = padded_vocab_size(config, *architectures)
        model = build_student(source, config, self.groups, num_rows)
        teacher = build_teacher(teacher_source, config, self.groups, num_rows) if teacher_source else None
        self.source, self.special = source, source.special
        training = config.training
        num_optimizer_steps = training.max_steps * (self._num_responses // training.global_batch_size)
        self.student = make_trainable(model, config.optimizer, config.parallel, num_optimizer_steps)
        self.interruption = Interruption(training.grace_seconds)
        self.engine = RolloutEngine(
            model,
            config.rollout,
            self.special,
            training.seed,
            self.groups,
            show_progress=config.logging.progress_bar and dist.get_rank() == 0,
            should_stop=self.interruption.is_received,
        )
        self.validation = Validation(config, source, model, self.groups)
        self.timers = PhaseTimers(torch.cuda.synchronize)
        self.metrics = StepMetrics(*architectures, groups=self.groups)
        self.expert_load = ExpertLoad(model, self.groups)
        self.stragglers = StragglerWatch()
        parts = Parts(
            config=config,
            student=model,
            teacher=teacher,
            engine=self.engine,
            shard=self._vocabulary_shard(num_rows, min(shape.vocab_size for shape in architectures)),
            special=self.special,
            groups=self.groups,
        )
        self.objective = OBJECTIVES[config.objective.name](parts)
        self.kept_trajectories = KeptTrajectories(parts, source.tokenizer)
        skipped_steps = SkippedSteps(Path(config.logging.directory), training.max_skipped_steps, lambda: self.step)
        self.train_step = TrainStep(self.student, self.objective, self.timers, self.expert_load, skipped_steps)
        self.prompt_stream = PromptStream(len(self.prompts), training.num_prompts_per_step, training.seed)
        self.audit = PromptAudit(Path(config.logging.directory) / "audit.jsonl", self.groups.dp)
        self.step, self.saved_step = 0, 0
        self._resume()
        self._log_plan(model, teacher)

    def run(self) -> bool:
        """Trains to `training.max_steps` and saves the last step. False if SIGTERM came before: then that is saved.

        TooManySkippedSteps ends it before, with the report of what there is.
        """
        is_first_rank = dist.get_rank() == 0
        directory = Path(self.config.logging.directory)
        writers = self._begin_records(directory)
        hide = not (self.config.logging.progress_bar and is_first_rank)
        bar = tqdm(total=self.config.training.max_steps, initial=self.step, disable=hide, unit="step")
        timeout = datetime.timedelta(minutes=self.config.parallel.distributed_timeout_minutes)
        with self.interruption, BackgroundSaves(timeout) as saves, bar, self._watched(writers, saves):
            while self.step < self.config.training.max_steps and not self.interruption.is_requested():
                metrics = self._one_step()
                if metrics is None:
                    break
                if self.validation.is_due(self.step + 1):
                    with self.timers.phase("evaluation"):
                        metrics |= self.validation.evaluate(self.step + 1)
                writers.write(self.step, metrics)
                self.step += 1
                bar.set_postfix_str(_summary(metrics))
                bar.update()
                if self._is_save_due():
                    self._save(saves)
            is_done = self.step >= self.config.training.max_steps
            if not is_done and self.step != self.saved_step:
                self._save(saves)
        writers.close()
        self.audit.close()
        if not is_done:
            logger.warning("stopped after %d training steps; the same command goes on from there", self.step)
        elif is_first_rank:
            write_report(directory)
        return is_done

    def _begin_records(self, directory: Path) -> Writer:
        """What this run writes besides checkpoints. All ranks must call it; ValueError on all if one cannot."""
        writers: list[Writer] = []

        def begin() -> None:
            writers.append(build_writers(self.config.logging, dist.get_rank(), self.step))
            try:
                if dist.get_rank() == 0:
                    save_config(self.config, directory / "config.yaml")
                self.audit.begin(self.step)
                self.kept_trajectories.begin(self.step)
            except OSError as error:
                raise ValueError(f"logging.directory ({directory}) cannot be written: {error}") from error

        agree(begin)
        return writers[0]

    @contextlib.contextmanager
    def _watched(self, writers: Writer, saves: BackgroundSaves) -> Iterator[None]:
        """While it lasts, a rank that hangs is found out; a run that goes nowhere leaves its report."""
        try:
            with self._watchdog(saves):
                yield
        except TooManySkippedSteps:
            writers.close()
            if dist.get_rank() == 0:
                write_report(self.config.logging.directory)
            raise

    def _one_step(self) -> dict[str, float] | None:
        """The algorithm: a rollout (or given sequences), its states, one optimizer step per global batch.

        None, and nothing has happened, if SIGTERM came before the student has learned anything in this step.
        """
        with self.timers.phase("total"):
            prompts_before = self.prompt_stream.state_dict()
            limit = max_new_tokens_at(self.step, self.config.curricula, self.config.rollout)
            threshold = dynamic_threshold_at(self.step, self.config.curricula, self.config.rollout)
            tasks = self._tasks(self.prompt_stream.next_batch(), limit)
            with self.timers.phase("rollout"):
                trajectories = self.objective.terminal_sequences(tasks, self.step, threshold)
            if self.interruption.is_requested():
                self.prompt_stream.load_state_dict(prompts_before)  # the engine may have left the rollout half done
                return None
            if self.kept_trajectories.is_due(self.step):
                with self.timers.phase("trajectories"):
                    self.kept_trajectories.keep(self.step, trajectories)
            states = self.objective.select_states(trajectories, self.step)
            with self.timers.phase("balance"):
                states, imbalances = balance_rows(
                    states, self.config.training, self.groups.dp, self.objective.rows_per_response
                )
            step_sums = [self.train_step(micro_batches) for micro_batches in self._global_batches(states)]
            wait_for_weights(self.student)
        self.audit.record(self.step, trajectories, self.config.rollout.num_responses_per_prompt)
        seconds = self.timers.seconds()  # and those of a checkpoint or an evaluation after the step before
        self.timers.reset()
        return self._straggler_metrics(seconds) | self.metrics.of_step(
            trajectories,
            states,
            step_sums,
            seconds,
            lr=learning_rate(self.student),
            length_limit=limit,
            dynamic_threshold=threshold,
            imbalances=imbalances,
            rollout_metrics=self.objective.rollout_metrics(),
            max_expert_load=self.expert_load.take(),
        )

    def _straggler_metrics(self, seconds: dict[str, float]) -> dict[str, float]:
        """Without what a rank waited for others in rollout. All ranks must call it: it gathers over the world."""
        idle = {"rollout": max(0.0, seconds["rollout"] - self.engine.statistics.idle_seconds)}
        by_rank: list[dict[str, float]] = [{}] * dist.get_world_size()
        dist.all_gather_object(by_rank, seconds | idle)
        return self.stragglers.metrics(by_rank)

    def _watchdog(self, saves: BackgroundSaves) -> Watchdog:
        models = [model for model in (self.objective.student, self.objective.teacher) if model is not None]
        return Watchdog(
            control_store(),
            dist.get_rank(),
            dist.get_world_size(),
            limit_minutes=self.config.parallel.distributed_timeout_minutes,
            phase=lambda: self.timers.current,
            progress=lambda: (self.timers.num_marks, [m.num_forwards for m in models], saves.sign_of_life()),
        )

    def _tasks(self, indices: list[int], limit: int) -> list[RolloutTask]:
        """The step's tasks, the same on all ranks; those of a prompt stand together.

        A prompt that comes twice in a step (at an epoch's end, or in a small data set) gets further sample indices.
        """
        tasks, num_responses = [], self.config.rollout.num_responses_per_prompt
        for place, index in enumerate(indices):
            prompt = self.prompts[index]
            max_new_tokens = domain_limit(prompt.domain, limit, self.config.rollout)
            first = num_responses * indices[:place].count(index)
            tasks += [RolloutTask(prompt, max_new_tokens, first + sample) for sample in range(num_responses)]
        return tasks

    @property
    def _num_responses(self) -> int:
        """Of a step, over all data-parallel ranks."""
        return self.config.training.num_prompts_per_step * self.config.rollout.num_responses_per_prompt

    def _global_batches(self, states: OnPolicyStates) -> list[list[OnPolicyStates]]:
        """This rank's rows of each global batch as micro-batches of rows of similar length, on the device."""
        training = self.config.training
        rows_per_step = training.global_batch_size * self.objective.rows_per_response // self.groups.dp.size()
        batches = []
        for begin in range(0, states.num_rows, rows_per_step):
            rows = states.rows(slice(begin, begin + rows_per_step))
            order = rows.lengths_B.argsort(stable=True).split(training.micro_batch_size)
            batches.append([rows.rows(some).padded_to(training.pad_to_multiple).to(device()) for some in order])
        return batches

    def _read_prompts(self, tokenizer) -> list[Prompt]:
        data = self.config.data
        read = read_prompts(
            data.train_files,
            tokenizer,
            max_prompt_tokens=data.max_prompt_tokens,
            apply_chat_template=data.apply_chat_template,
            enable_thinking=data.enable_thinking,
            max_response_tokens=data.max_response_tokens if self.config.objective.needs_responses else None,
        )
        if read.num_too_long:
            logger.info("%d prompts of over %d tokens are left out", read.num_too_long, data.max_prompt_tokens)
        if read.num_long_responses:
            message = "%d prompts with responses of over %d tokens are left out"
            logger.info(message, read.num_long_responses, data.max_response_tokens)
        return read.prompts

    def _vocabulary_shard(self, num_rows: int, vocab_size: int) -> VocabularyShard:
        rows = num_rows // self.groups.tp.size()
        return VocabularyShard(
            first=self.groups.tp.rank() * rows,
            num_rows=rows,
            # a mask token without a row at the teacher lies behind its vocabulary, and takes no part anyway
            vocab_size=vocab_size,
            mask_token_id=self.special.mask_token_id,
            group=self.groups.tp,
        )

    @property
    def _checkpoint_directory(self) -> Path:
        return Path(self.config.checkpoint.directory or Path(self.config.logging.directory) / "checkpoints")

    def _is_save_due(self) -> bool:
        interval = self.config.checkpoint.save_interval
        if self.step == self.validation.best_step:
            return True
        return self.step == self.config.training.max_steps or bool(interval and self.step % interval == 0)

    def _save(self, saves: BackgroundSaves) -> None:
        progress = {
            "step": self.step,
            "prompt_stream": self.prompt_stream.state_dict(),
            "scheduler": self.student.scheduler.state_dict(),
            "totals": self.metrics.state_dict(),
            "validation": self.validation.state_dict(),
            "fp8_scales": self.student.model.link.union(scaling_state(self.student.model)),
        }
        with self.timers.phase("checkpoint"):
            save_train_state(
                saves.save if self.config.checkpoint.async_save else save_checkpoint,
                step_folder(self._checkpoint_directory, self.step),
                self.student.model,
                self.student.optimizer,
                self.groups,
                progress,
                self.source,
                self.config,
                self.validation.best_step,
            )
        self.saved_step = self.step

    def _resume(self) -> None:
        directory, verify = self._checkpoint_directory, self.config.checkpoint.verify
        loaded = load_newest_train_state(directory, verify, self.student.model, self.student.optimizer, self.groups)
        if loaded is None:
            return
        folder, progress = loaded
        self.step = self.saved_step = progress["step"]
        self.prompt_stream.load_state_dict(progress["prompt_stream"])
        self.student.scheduler.load_state_dict(progress["scheduler"])
        self.metrics.load_state_dict(progress["totals"])
        self.validation.load_state_dict(progress["validation"], self._checkpoint_directory)
        load_scaling_state(self.student.model, progress["fp8_scales"])
        logger.info("resumed from %s at step %d", folder, self.step)

    def _log_plan(self, model, teacher) -> None:
        training, ranks = self.config.training, self.groups.dp.size()
        logger.info(
            "student %.3g and teacher %.3g parameters on the first of %d tensor- x %d context- x %d pipeline-parallel "
            "ranks",
            parameter_count(model),
            parameter_count(teacher) if teacher else 0,
            self.groups.tp.size(),
            self.groups.cp.size(),
            self.groups.pp.size(),
        )
        logger.info(
            "%d responses a step / %d data-parallel ranks = %d per rank; %d optimizer steps of %d responses",
            self._num_responses,
            ranks,
            self._num_responses // ranks,
            self._num_responses // training.global_batch_size,
            training.global_batch_size,
        )


def _summary(metrics: dict[str, float]) -> str:
    """What there is no figure of, such as a loss where nothing was trained, is nan."""
    nan = float("nan")
    return (
        f"loss {metrics.get('train/loss', nan):.4f}, {metrics.get('rollout/tokens_per_step', nan):.2f} tokens/step, "
        f"agreement {metrics.get('train/teacher_agreement', nan):.3f}"
    )
