"""The teacher's part of a training step: one causal forward over what the student wrote.

The teacher's output at position `i - 1` is the target distribution for position `i`. Between its forward and the loss
only the hidden states at those positions are kept; its logits are made chunk by chunk inside the loss. Where ranks
share a sequence, the target of a part's first position is the last output of the part before.

Under `teacher.fill` argmax it reads a second stream, which stands for what is in each block (`argmax_fill`). Then the
first position of a block is predicted by the clean output before it, the others by the filled one before them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_opdlm.diffusion.attention_pattern import filled_mask
from megatron_opdlm.diffusion.logit_shift import predicting_outputs_of_streams
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.models.build import Qwen3Model
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.context_link import ContextLink


@torch.no_grad()
def teacher_hidden_states(
    teacher: PipelineModel,
    micro_batches: list[OnPolicyStates],
    filled: list[torch.Tensor] | None = None,
    block_size: int | None = None,
) -> list[torch.Tensor] | list[None]:
    """For each micro-batch the hidden states `[N, H]` whose outputs predict its N trained positions, in their order.

    N counts those in this rank's part of the sequences. `filled` has, for each micro-batch, the filled stream `[B, T]`
    in blocks of `block_size`; None is the terminal fill.
    A forward-only pass of Megatron's schedule, so all ranks must call it. Only the last pipeline stage gets them, the
    others get None for each.
    """
    forward_step = functools.partial(_forward_step, teacher)
    items, num_streams = micro_batches, 1
    if filled is not None:
        forward_step = functools.partial(_filled_forward_step, teacher, block_size)
        items, num_streams = list(zip(micro_batches, filled, strict=True)), 2
    with teacher.on_device():
        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(items) for _ in teacher.chunks],
            model=teacher.chunks,
            num_microbatches=len(micro_batches),
            seq_length=max(states.clean_ids_BT.shape[1] for states in micro_batches),
            micro_batch_size=num_streams * len(micro_batches[0].lengths_B),
            forward_only=True,
            collect_non_loss_data=True,
        )
    return collected if teacher.is_last_stage else [None] * len(micro_batches)


def _forward_step(teacher: PipelineModel, data_iterator: Iterator[OnPolicyStates], model: Qwen3Model):
    teacher.num_forwards += 1
    states, context = next(data_iterator), teacher.context
    columns = context.columns(states.clean_ids_BT.shape[1])
    part = states.columns(columns)
    positions_T = torch.arange(columns.start, columns.stop, device=part.clean_ids_BT.device)

    def targets(hidden_TBH: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        return outputs_before(model.whole_sequence(hidden_TBH).transpose(0, 1), part.is_trained_BT, context)

    return model(part.clean_ids_BT, positions_T, None), targets


def _filled_forward_step(
    teacher: PipelineModel,
    block_size: int,
    data_iterator: Iterator[tuple[OnPolicyStates, torch.Tensor]],
    model: Qwen3Model,
):
    teacher.num_forwards += 1
    states, filled_BT = next(data_iterator)
    num_positions = filled_BT.shape[1]
    mask = filled_mask(num_positions, block_size, filled_BT.device)

    def targets(hidden_TBH: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        clean_BTH, filled_BTH = model.whole_sequence(hidden_TBH).transpose(0, 1).chunk(2)
        # A causal model's outputs predict the next token, wherever they were made.
        predicting_BTH = predicting_outputs_of_streams(clean_BTH, filled_BTH, block_size, "next_token")
        return predicting_BTH[states.is_trained_BT]

    streams = torch.cat([states.clean_ids_BT, filled_BT])
    return model(streams, torch.arange(num_positions, device=streams.device), mask), targets


def outputs_before(hidden_BTH: torch.Tensor, is_trained_BT: torch.Tensor, context: ContextLink) -> torch.Tensor:
    """The outputs `[N, H]` at the positions just before the N trained ones, in their order.

    Both arguments have this rank's part of the positions. Communicates over the context-parallel group, whose ranks
    must all call it.
    """
    before_BH = context.from_part_before(hidden_BTH[:, -1])
    rows_N, columns_N = is_trained_BT.nonzero(as_tuple=True)
    is_first_N = columns_N == 0
    assert not (context.is_first and is_first_N.any()), "no output of the teacher predicts the first position"
    targets_NH = hidden_BTH[rows_N, columns_N - 1]
    targets_NH[is_first_N] = before_BH[rows_N[is_first_N]]
    return targets_NH
