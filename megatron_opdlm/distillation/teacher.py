"""The teacher's part of a training step: one causal forward over what the student wrote.

The teacher's output at position `i - 1` is the target distribution for position `i`. Between its forward and the loss
only the hidden states at those positions are kept; its logits are made chunk by chunk inside the loss.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.models.build import Qwen3Model


@torch.no_grad()
def teacher_hidden_states(teacher: Qwen3Model, micro_batches: list[OnPolicyStates]) -> list[torch.Tensor]:
    """For each micro-batch the hidden states `[N, H]` whose outputs predict its N trained positions, in their order.

    A forward-only pass of Megatron's schedule, so all ranks must call it; the last pipeline stage gets the result.
    """
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter(micro_batches),
        model=teacher,
        num_microbatches=len(micro_batches),
        seq_length=max(states.clean_ids_BT.shape[1] for states in micro_batches),
        micro_batch_size=len(micro_batches[0].lengths_B),
        forward_only=True,
        collect_non_loss_data=True,
    )


def _forward_step(data_iterator: Iterator[OnPolicyStates], model: Qwen3Model):
    states = next(data_iterator)
    positions_T = torch.arange(states.clean_ids_BT.shape[1], device=states.clean_ids_BT.device)

    def targets(hidden_TBH: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        hidden_BTH = model.whole_sequence(hidden_TBH).transpose(0, 1)
        return hidden_BTH[predicts_trained_position(states.is_trained_BT)]

    return model(states.clean_ids_BT, positions_T, None), targets


def predicts_trained_position(is_trained_BT: torch.Tensor) -> torch.Tensor:
    """The positions just before trained ones. The first position of a sequence is prompt, hence never trained."""
    assert not is_trained_BT[:, 0].any(), "no output of the teacher predicts the first position"
    return is_trained_BT.roll(-1, dims=1)
