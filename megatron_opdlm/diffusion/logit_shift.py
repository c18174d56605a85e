"""Which of the student's outputs predicts which position.

`none`, the paper's rule: the output at a masked position predicts the token there. `next_token`, as in Dream and
Fast-dLLM v2 and in the autoregressive model that the student was: the output at position `i - 1` predicts position `i`.
Inside a block that is the output of the noisy neighbour. The first position of a block is predicted by the clean token
before the block, the only one there that rollout and training have in common. Position 0 has none; it is prompt.

Rollout and training share `predicting_outputs`, so the student is trained with the outputs that it decodes by:

    rollout:    predicting_outputs(outputs of the block, output kept of the position before it, logit_shift)
    training:   predicting_outputs_of_streams(clean outputs, noisy outputs, block_size, logit_shift)

Legend: `B` sequences, `T` positions, `M` blocks of `K` positions, `H` hidden.
"""

from __future__ import annotations

import torch

from megatron_opdlm.config.method import LogitShift


def predicting_outputs(
    block_outputs_MKH: torch.Tensor, output_before_MH: torch.Tensor | None, logit_shift: LogitShift
) -> torch.Tensor:
    """For each position of a block the output that predicts it, `[..., K, H]`.

    Args:
        block_outputs_MKH: of the noisy positions of blocks, `[..., K, H]`.
        output_before_MH: of the clean position just before each block, `[..., H]`; None will do for `none`.

    Example:
        >>> own, before = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([9.0])
        >>> predicting_outputs(own, before, "next_token").tolist()
        [[9.0], [1.0], [2.0]]
    """
    if logit_shift == "none":
        return block_outputs_MKH
    assert output_before_MH is not None, "the first position of a block is predicted by the one before it"
    return torch.cat([output_before_MH[..., None, :], block_outputs_MKH[..., :-1, :]], dim=-2)


def predicting_outputs_of_streams(
    clean_BTH: torch.Tensor, noisy_BTH: torch.Tensor, block_size: int, logit_shift: LogitShift
) -> torch.Tensor:
    """The same for all blocks of a training forward at once, `[B, T, H]`; T is a whole number of blocks.

    What stands at position 0 predicts nothing.
    """
    if logit_shift == "none":
        return noisy_BTH
    # The last clean output of each block goes to the next block; block 0 gets some other, for its position 0.
    before_BMH = clean_BTH[:, block_size - 1 :: block_size].roll(1, dims=1)
    blocks_BMKH = noisy_BTH.unflatten(1, (-1, block_size))
    return predicting_outputs(blocks_BMKH, before_BMH, logit_shift).flatten(1, 2)
