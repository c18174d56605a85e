"""What the teacher says about each token of a rollout, and how far the student was from it when it committed the token.

Training looks at one state of each block. Here every response token is looked at, in the very state in which the
rollout committed it: the rows of `states.selection` all_steps, of which only what a step committed counts.

    inspection = inspect_trajectory(student, teacher, trajectory, shard, special, rollout, divergence, training)
    inspection.divergence_R                    # nats, NaN behind the end of what counts
    inspection.alternative_ids_Rk              # the teacher's most likely tokens at each position

The student's log-probability here and the rollout's are the same but for rounding, where the weights are the same.

Legend: `B` rows, `T` positions, `R` response tokens, `N` inspected positions, `V` vocabulary rows of this rank, `H`
hidden, `k` alternatives, `F` figures of a position.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from megatron_opdlm.config.schema import DivergenceConfig, RolloutConfig, StatesConfig, TrainingConfig
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.diffusion.logit_shift import predicting_outputs_of_streams
from megatron_opdlm.diffusion.state_selections import rows_per_trajectory
from megatron_opdlm.diffusion.states import OnPolicyStates, select_states
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distillation.chunked_loss import divergence_loss, live_logits
from megatron_opdlm.distillation.teacher import outputs_before
from megatron_opdlm.models.fp8 import without_fp8
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.device import device
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard, global_top_logits, sum_over_ranks_

EVERY_STATE = StatesConfig(selection="all_steps")
NUM_ALTERNATIVES = 5
"""Of the teacher's most likely tokens so many are told."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """Figures of each response token, on the CPU; NaN (and id -1) where the token does not count."""

    divergence_R: torch.Tensor
    """float64: from the teacher, of the kind and with the filters of `divergence`, in nats."""
    student_log_prob_R: torch.Tensor
    """float64: what the student gives the token in the state in which it was committed."""
    teacher_log_prob_R: torch.Tensor
    """float64: what the teacher gives the token, unfiltered, after all that stands before it."""
    alternative_ids_Rk: torch.Tensor
    """int64: the teacher's most likely tokens, the likeliest first."""
    alternative_log_probs_Rk: torch.Tensor
    """float64: and their log-probabilities, unfiltered."""


@torch.no_grad()
def inspect_trajectory(
    student: PipelineModel,
    teacher: PipelineModel,
    trajectory: Trajectory,
    shard: VocabularyShard,
    special: SpecialTokens,
    rollout: RolloutConfig,
    divergence: DivergenceConfig,
    training: TrainingConfig,
) -> Inspection:
    """The figures of all response tokens that count, end token included.

    Costs a forward of both models over `rollout.denoising_steps_per_block` rows, `training.micro_batch_size` at a
    time. The teacher reads the terminal sequence, whatever `teacher.fill` says; the student decodes without FP8, as in
    the rollout. All ranks must call it, those that hold one model together with the same trajectory, and all of them
    get the figures.
    """
    states = committing_states(trajectory, special, rollout.denoising_steps_per_block)
    rows = states.padded_to(training.pad_to_multiple).to(device())
    parts = torch.arange(rows.num_rows).split(training.micro_batch_size)
    figures_TF = sum(
        _figures(student, teacher, rows.rows(part), shard, rollout, divergence).sum(dim=0) for part in parts
    )
    response = slice(trajectory.prompt_length, len(trajectory.terminal_ids_T))
    is_inspected_R = rows.is_trained_BT.any(dim=0)[response].cpu()
    figures_RF = figures_TF[response].cpu()
    figures_RF[~is_inspected_R] = torch.nan
    divergence_R, student_R, teacher_R = figures_RF[:, :3].unbind(1)
    ids_Rk, log_probs_Rk = figures_RF[:, 3:].chunk(2, dim=1)
    return Inspection(divergence_R, student_R, teacher_R, ids_Rk.nan_to_num(nan=-1).long(), log_probs_Rk)


def committing_states(trajectory: Trajectory, special: SpecialTokens, denoising_steps_per_block: int) -> OnPolicyStates:
    """Every state that the rollout was in, a row per step number; trained is what counts and was committed there."""
    states = select_states(
        [trajectory],
        EVERY_STATE,
        num_rows=rows_per_trajectory(EVERY_STATE, denoising_steps_per_block),
        block_size=trajectory.block_size,
        mask_token_id=special.mask_token_id,
        end_token_ids=special.end_token_ids,
        pad_token_id=special.pad_token_id,
        seed=0,  # nothing is drawn for these states
        step=0,
        train_on_end_token=True,
    )
    is_trained_BT = states.is_trained_BT & states.is_committed_BT
    return dataclasses.replace(states, is_trained_BT=is_trained_BT, num_trained_by_trajectory_B=None)


def _figures(
    student: PipelineModel,
    teacher: PipelineModel,
    states: OnPolicyStates,
    shard: VocabularyShard,
    rollout: RolloutConfig,
    divergence: DivergenceConfig,
) -> torch.Tensor:
    """float64 [B, T, F]: divergence, both log-probabilities, the alternatives' ids and log-probabilities; 0 elsewhere.

    A token is inspected in one of the rows, so that figures of rows can be added up. Ids are exact in float64.
    """
    width = states.clean_ids_BT.shape[1]
    columns = student.context.columns(width)
    part = states.columns(columns)
    positions_T = torch.arange(columns.start, columns.stop, device=part.clean_ids_BT.device)
    streams = torch.cat([part.clean_ids_BT, part.noisy_ids_BT])
    for chunk in student.chunks:
        chunk.eval()
    with without_fp8(student):
        student_TBH = student(streams, positions_T, states.lengths_B)
    teacher_TBH = teacher(part.clean_ids_BT, positions_T, None)
    figures_BTF = torch.zeros(
        states.num_rows, width, 3 + 2 * NUM_ALTERNATIVES, dtype=torch.float64, device=part.clean_ids_BT.device
    )
    if student.is_last_stage:
        clean_BTH, noisy_BTH = student.whole_sequence(student_TBH).transpose(0, 1).chunk(2)
        student_BTH = predicting_outputs_of_streams(clean_BTH, noisy_BTH, rollout.block_size, rollout.logit_shift)
        teacher_BTH = teacher.whole_sequence(teacher_TBH).transpose(0, 1)
        teacher_NH = outputs_before(teacher_BTH, part.is_trained_BT, teacher.context)
        figures_BTF[:, columns][part.is_trained_BT] = _figures_of_positions(
            student_BTH[part.is_trained_BT],
            student.output_weight,
            teacher_NH,
            teacher.output_weight,
            part.clean_ids_BT[part.is_trained_BT],
            shard,
            divergence,
        ).double()
    # What a stage of either model has sent has arrived once its link has shared something.
    shared_BTF = student.link.share(teacher.link.share(figures_BTF).wait()).wait()
    return student.context.add_up_(shared_BTF)


def _figures_of_positions(
    student_NH: torch.Tensor,
    student_weight_VH: torch.Tensor,
    teacher_NH: torch.Tensor,
    teacher_weight_VH: torch.Tensor,
    target_ids_N: torch.Tensor,
    shard: VocabularyShard,
    settings: DivergenceConfig,
) -> torch.Tensor:
    """[N, F]. Communicates over `shard.group`, whose ranks must all call it with the same N."""
    result = divergence_loss(
        student_NH,
        student_weight_VH,
        teacher_NH,
        teacher_weight_VH,
        loss_weights_N=torch.zeros(len(target_ids_N), device=student_NH.device),
        target_ids_N=target_ids_N,
        settings=settings,
        shard=shard,
    )
    said_NF = [torch.empty(0, 1 + 2 * NUM_ALTERNATIVES, device=student_NH.device)]
    for start in range(0, len(target_ids_N), settings.chunk_size):
        chunk = slice(start, start + settings.chunk_size)
        said_NF.append(what_the_teacher_says(teacher_NH[chunk], teacher_weight_VH, target_ids_N[chunk], shard))
    of_student_N2 = torch.stack([result.divergence_N, result.student_log_prob_N], dim=1)
    return torch.cat([of_student_N2, torch.cat(said_NF)], dim=1)


def what_the_teacher_says(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, target_ids_N: torch.Tensor, shard: VocabularyShard
) -> torch.Tensor:
    """[N, 1 + 2 k]: the log-probability of the target, the ids of the k most likely tokens, their log-probabilities.

    Where there are fewer than k tokens, the rest of the ids are of rows that take no part, at minus infinity.
    Communicates over `shard.group`: the k candidates and two numbers a position. Memory: two buffers `[N, V]`.
    """
    dead_rows = shard.dead_rows.to(hidden_NH.device)
    logits_NV = live_logits(hidden_NH, weight_VH, dead_rows)
    top_Nk, ids_Nk = global_top_logits(logits_NV, NUM_ALTERNATIVES, shard)
    highest_N1 = top_Nk[:, :1]
    logits_NV.sub_(highest_N1)
    row_N, is_here_N = shard.locate(target_ids_N)
    target_N = logits_NV.gather(1, row_N[:, None])[:, 0].masked_fill(~is_here_N, 0.0)
    mass_N, target_N = sum_over_ranks_(torch.stack([logits_NV.exp().sum(dim=1), target_N]), shard)
    log_mass_N1 = mass_N.log()[:, None]
    return torch.cat([target_N[:, None] - log_mass_N1, ids_Nk, top_Nk - highest_N1 - log_mass_N1], dim=1)
