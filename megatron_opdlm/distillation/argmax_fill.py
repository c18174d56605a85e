"""What the teacher reads inside a block under `teacher.fill` argmax: the student's own most likely tokens.

With `terminal`, the default, the teacher's context of a position is what the student finally wrote before it. But in
the state that is trained, the tokens of the same block were not there yet. With `argmax` the context inside the block
is what the state shows, and at masked positions the token that the student finds most likely in that state; earlier
blocks are clean, since the student saw them so. This takes a forward of the student without gradients, and one of the
teacher over two streams (`attention_pattern.filled_mask`): about twice the teacher's time and a third more of the
student's. An ablation.

    filled = fill_with_argmax(student, micro_batches, shard, block_size=4, logit_shift="none", chunk_size=128)
    targets = teacher_hidden_states(teacher, micro_batches, filled, block_size=4)

Legend: `B` sequences, `T` positions, `N` trained positions, `V` vocabulary rows of this rank, `H` hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_opdlm.config.method import LogitShift
from megatron_opdlm.diffusion.logit_shift import predicting_outputs_of_streams
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.distillation.chunked_loss import live_logits
from megatron_opdlm.models.build import Qwen3Model
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard, global_argmax


@torch.no_grad()
def fill_with_argmax(
    student: PipelineModel,
    micro_batches: list[OnPolicyStates],
    shard: VocabularyShard,
    *,
    block_size: int,
    logit_shift: LogitShift,
    chunk_size: int,
) -> list[torch.Tensor]:
    """For each micro-batch the filled stream, int64 `[B, T]`, on all pipeline stages.

    Trained positions hold the student's most likely token, the mask token left out (the lowest id on ties); the others
    hold the clean token. A masked position that is not trained keeps its terminal token, which nobody reads: it is at
    or behind the end of what counts, and the teacher looks back only. Logits exist for `chunk_size` positions at once.

    A forward-only pass of Megatron's schedule, so all ranks must call it. Does not know context parallelism.
    """

    def forward_step(data_iterator: Iterator[OnPolicyStates], model: Qwen3Model):
        student.num_forwards += 1
        states = next(data_iterator)
        streams = torch.cat([states.clean_ids_BT, states.noisy_ids_BT])
        positions_T = torch.arange(streams.shape[1], device=streams.device)

        def fill(hidden_TBH: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            clean_BTH, noisy_BTH = model.whole_sequence(hidden_TBH).transpose(0, 1).chunk(2)
            hidden_BTH = predicting_outputs_of_streams(clean_BTH, noisy_BTH, block_size, logit_shift)
            likely_N = _most_likely(hidden_BTH[states.is_trained_BT], student.output_weight, shard, chunk_size)
            return states.clean_ids_BT.masked_scatter(states.is_trained_BT, likely_N)

        return model(streams, positions_T, states.lengths_B), fill

    for chunk in student.chunks:
        chunk.eval()
    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in student.chunks],
        model=student.chunks,
        num_microbatches=len(micro_batches),
        seq_length=max(states.clean_ids_BT.shape[1] for states in micro_batches),
        micro_batch_size=2 * len(micro_batches[0].lengths_B),
        forward_only=True,
        collect_non_loss_data=True,
    )
    filled = collected if student.is_last_stage else [states.clean_ids_BT.clone() for states in micro_batches]
    return [student.link.share(ids_BT).wait() for ids_BT in filled]


def _most_likely(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, shard: VocabularyShard, chunk_size: int
) -> torch.Tensor:
    """int64 [N]. Communicates over `shard.group`, whose ranks must all call it with the same N."""
    dead_rows = shard.dead_rows.to(hidden_NH.device)
    ids = [torch.empty(0, dtype=torch.int64, device=hidden_NH.device)]
    for start in range(0, len(hidden_NH), chunk_size):
        logits_CV = live_logits(hidden_NH[start : start + chunk_size], weight_VH, dead_rows)
        ids.append(global_argmax([logits_CV], shard)[1][0].long())
    return torch.cat(ids)
