"""The states the student is trained in: partly masked views of the trajectories it decoded itself.

By default one of the realised denoising steps `r` of each block that holds response tokens is drawn uniformly. The
state shows the tokens committed before `r` (and the prompt's) and masks the rest of the block, which is exactly what
the student saw when it took step `r`. A noisy token sees the clean tokens of the blocks before its own, so all blocks
of a sequence are trained in one forward. The other choices of `states.selection` are in `state_selections`. A
trajectory's draws come from its own generator (`randomness`), so its states do not depend on which share its batch.

Trained are the masked response positions before the first end token. The end token itself (but for
`train_on_end_token`), what follows it in the last block, what lies beyond the length limit and the padding are not.

A selection may give several rows per trajectory. All trajectories then give equally many, so that every global batch
and every rank has as many rows: where a trajectory has fewer states, the rest mask and train nothing. The first row is
the whole sequence. Further rows end behind their last trained block, which loses nothing, since no token sees a later
block; a row without one is the first block alone, and costs little.

Example: 2 prompt tokens, blocks of 4, end token 9, mask token 0. Block 0 has only step 1 to draw; in block 1 this
seed draws step 2: the token of step 1 is visible, and token 4 is masked but follows the end token.

    >>> trajectory = Trajectory(
    ...     prompt_id=12,
    ...     sample_index=0,
    ...     prompt_length=2,
    ...     block_size=4,
    ...     terminal_ids_T=torch.tensor([3, 5, 7, 6, 8, 1, 9, 4]),
    ...     step_map_R=torch.tensor([1, 1, 2, 1, 2, 3]),
    ...     log_probs_R=torch.tensor([-0.5, -0.25, -1.0, -0.125, -0.5, -2.0]),
    ...     response_length=5,
    ...     stop_reason="end_token",
    ...     domain="math",
    ... )
    >>> states = select_states(
    ...     [trajectory], block_size=4, mask_token_id=0, end_token_ids=[9], pad_token_id=2, seed=1, step=0
    ... )
    >>> states.noisy_ids_BT.tolist()
    [[3, 5, 0, 0, 0, 1, 0, 0]]
    >>> states.is_trained_BT.int().tolist()
    [[0, 0, 1, 1, 1, 0, 0, 0]]
    >>> states.is_committed_BT.int().tolist()
    [[0, 0, 1, 1, 1, 0, 1, 0]]

Legend: `B` sequences, `T` their terminal tokens, `R` response, `M` blocks that hold response tokens, `K` positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from megatron_opdlm.config.schema import LossReduction, StatesConfig
from megatron_opdlm.diffusion.blocks import round_up_to_grid
from megatron_opdlm.diffusion.randomness import sequence_generator
from megatron_opdlm.diffusion.state_selections import Masks, select_masks
from megatron_opdlm.diffusion.trajectory import Trajectory

ONE_PER_BLOCK, RANDOM_MASK = StatesConfig(), StatesConfig(selection="random_mask")


@dataclass(frozen=True, eq=False)
class OnPolicyStates:
    """A batch of states, rows padded on the right. The module's docstring works through one."""

    clean_ids_BT: torch.Tensor
    """int64: the terminal sequences. Padding columns hold some valid token id, here and in the noisy stream."""
    noisy_ids_BT: torch.Tensor
    """int64: the same with the masked positions replaced by the mask token."""
    lengths_B: torch.Tensor
    """int64: real tokens of each row, whole blocks."""
    is_trained_BT: torch.Tensor
    """bool: masked, in the response, before the first end token (or at it, under `train_on_end_token`) and within the
    counted length; never padding."""
    is_committed_BT: torch.Tensor
    """bool: committed in the drawn step, a subset of the masked. Where also trained, the on-policy gap is measured."""
    log_probs_BT: torch.Tensor
    """float32: the rollout's log-probability at response positions, 0 elsewhere."""
    is_first_row_B: torch.Tensor = None
    """bool: the row that counts its trajectory. Left out: every row, each being all of its trajectory."""
    num_trained_by_trajectory_B: torch.Tensor = None
    """int64: trained positions of the row's trajectory, over all its rows. Left out: those of the row."""
    prompt_ids_B: torch.Tensor = None
    """int64: the prompt that each row answers, by its row in the data set. Left out: -1, none."""

    def __post_init__(self) -> None:
        if self.is_first_row_B is None:
            object.__setattr__(self, "is_first_row_B", torch.ones_like(self.lengths_B, dtype=torch.bool))
        if self.num_trained_by_trajectory_B is None:
            object.__setattr__(self, "num_trained_by_trajectory_B", self.num_trained_B)
        if self.prompt_ids_B is None:
            object.__setattr__(self, "prompt_ids_B", torch.full_like(self.lengths_B, -1))
        for name, tensor in self._tensors():
            expected = self.clean_ids_BT.shape if name.endswith("_BT") else self.clean_ids_BT.shape[:1]
            assert tensor.shape == expected, f"{name} is {tuple(tensor.shape)}, not {tuple(expected)}"

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.lengths_B)

    @property
    def num_trained_B(self) -> torch.Tensor:
        """Trained positions of each row, int64 [B]."""
        return self.is_trained_BT.sum(dim=1)

    def rows(self, index: slice | Sequence[int] | torch.Tensor) -> OnPolicyStates:
        """The rows at `index` (a slice or several row numbers), at the same width."""
        return self._map(lambda name, tensor: tensor[index])

    def columns(self, part: slice) -> OnPolicyStates:
        """A part of the positions of all rows. `lengths_B` stay those of the rows; `num_trained_B` is of the part."""
        return self._map(lambda name, tensor: tensor[:, part] if name.endswith("_BT") else tensor)

    def to(self, device: torch.device | str) -> OnPolicyStates:
        """The same states on `device`."""
        return self._map(lambda name, tensor: tensor.to(device))

    def padded_to(self, multiple: int) -> OnPolicyStates:
        """The same rows, as wide as the longest of them rounded up to `multiple` tokens: trimmed or padded.

        `multiple` is `training.pad_to_multiple`, itself a multiple of the block size.
        """
        width = round_up_to_grid(int(self.lengths_B.max()), multiple)
        missing = width - self.clean_ids_BT.shape[1]
        # A negative count trims. Padding is neither attended nor trained, so any valid token id will do: 0.
        return self._map(lambda name, tensor: pad(tensor, (0, missing)) if name.endswith("_BT") else tensor)

    @property
    def num_trajectories(self) -> int:
        """Trajectories that these rows count."""
        return int(self.is_first_row_B.sum())

    def loss_weights_BT(self, reduction: LossReduction) -> torch.Tensor:
        """float32 [B, T]: weights under which a sum over the global batch, over its `loss_count`, is the loss.

        `sequence`: the sum over a trajectory is the mean over its trained positions, of all its rows together, so that
        over the number of trajectories the mean of those means is left. A trajectory without trained positions adds
        nothing, but counts; of several rows a late one, in which few blocks have a state left, weighs as little as it
        has trained positions. `token`: one at each trained position. Either way it does not matter how rows are split
        into micro-batches and over ranks.
        """
        is_trained_BT = self.is_trained_BT.float()
        if reduction == "token":
            return is_trained_BT
        return is_trained_BT / self.num_trained_by_trajectory_B.clamp(min=1)[:, None]

    def loss_count(self, reduction: LossReduction) -> int:
        """What these states add to the number that the loss is a mean over: trajectories, or trained positions."""
        return int(self.is_trained_BT.sum()) if reduction == "token" else self.num_trajectories

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]

    def _map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> OnPolicyStates:
        return type(self)(**{name: change(name, tensor) for name, tensor in self._tensors()})


def select_states(
    trajectories: Sequence[Trajectory],
    settings: StatesConfig = ONE_PER_BLOCK,
    *,
    num_rows: int = 1,
    block_size: int,
    mask_token_id: int,
    end_token_ids: Sequence[int],
    pad_token_id: int,
    seed: int,
    step: int,
    train_on_end_token: bool = False,
) -> OnPolicyStates:
    """The states of every trajectory, `num_rows` rows each; the rows of a trajectory stand together.

    One that was given, not rolled out, has no states that the student was in: it gets a random mask.

    Args:
        trajectories: at least one, all decoded with this `block_size`.
        settings: which states.
        num_rows: `rows_per_trajectory` of these settings.
        block_size: K of the absolute grid.
        mask_token_id: what masked positions hold.
        end_token_ids: every token that ends a response, as in the rollout.
        pad_token_id: fills the columns beyond a row's length; any valid id.
        seed, step: `training.seed` and the training step; with the trajectory's own numbers they seed its draws.
        train_on_end_token: train the first end token of a response too, where it is masked.
    """
    assert trajectories, "states of no trajectory at all"
    end_ids = torch.tensor(list(end_token_ids), dtype=torch.int64)
    rows: list[_Row] = []
    for trajectory in trajectories:
        assert trajectory.block_size == block_size, f"decoded in blocks of {trajectory.block_size}, not {block_size}"
        numbers = (seed, step, trajectory.prompt_id, trajectory.sample_index)
        generator = sequence_generator(*numbers, purpose="states")
        selection = RANDOM_MASK if trajectory.is_given else settings
        masks = select_masks(trajectory.steps_by_block_MK, selection, num_rows=num_rows, generator=generator)
        rows += _rows_of(trajectory, masks, mask_token_id, end_ids, train_on_end_token)
    clean, noisy, is_trained, is_committed, log_probs = zip(*rows, strict=True)
    by_trajectory_NR = torch.tensor([int(row.is_trained_T.sum()) for row in rows]).view(-1, num_rows)
    return OnPolicyStates(
        clean_ids_BT=pad_sequence(clean, batch_first=True, padding_value=pad_token_id),
        noisy_ids_BT=pad_sequence(noisy, batch_first=True, padding_value=pad_token_id),
        lengths_B=torch.tensor([len(ids_T) for ids_T in clean]),
        is_trained_BT=pad_sequence(is_trained, batch_first=True),
        is_committed_BT=pad_sequence(is_committed, batch_first=True),
        log_probs_BT=pad_sequence(log_probs, batch_first=True),
        is_first_row_B=torch.arange(len(rows)) % num_rows == 0,
        num_trained_by_trajectory_B=by_trajectory_NR.sum(dim=1).repeat_interleave(num_rows),
        prompt_ids_B=torch.tensor([trajectory.prompt_id for trajectory in trajectories]).repeat_interleave(num_rows),
    )


class _Row(NamedTuple):
    """The tensors `[T]` of one row."""

    clean_ids_T: torch.Tensor
    noisy_ids_T: torch.Tensor
    is_trained_T: torch.Tensor
    is_committed_T: torch.Tensor
    log_probs_T: torch.Tensor


def _rows_of(
    trajectory: Trajectory, masks: Masks, mask_token_id: int, end_ids: torch.Tensor, train_on_end_token: bool
) -> list[_Row]:
    """The rows of one trajectory: the first one whole, the others cut behind their last trained block."""
    num_prompt, num_response = trajectory.prompt_length, len(trajectory.step_map_R)
    clean_T = trajectory.terminal_ids_T
    # The prompt may hold end tokens too (a chat template writes them), so only the response is looked at.
    is_end_R = torch.isin(clean_T[num_prompt:], end_ids)
    num_ends_before_R = is_end_R.cumsum(dim=0) - is_end_R.long()
    is_wanted_R = (num_ends_before_R == 0) & (~is_end_R | train_on_end_token)
    num_counted = 0 if trajectory.stop_reason == "not_finite" else trajectory.response_length
    is_counted_R = is_wanted_R & (torch.arange(num_response) < num_counted)
    log_probs_T = pad(trajectory.log_probs_R, (num_prompt, 0))
    rows = []
    for place, (is_masked_MK, is_committed_MK) in enumerate(zip(*masks, strict=True)):
        is_masked_T = pad(is_masked_MK.flatten()[-num_response:], (num_prompt, 0))
        is_committed_T = pad(is_committed_MK.flatten()[-num_response:], (num_prompt, 0))
        is_trained_T = is_masked_T & pad(is_counted_R, (num_prompt, 0))
        noisy_T = clean_T.masked_fill(is_masked_T, mask_token_id)
        row = _Row(clean_T, noisy_T, is_trained_T, is_committed_T, log_probs_T)
        rows.append(row if place == 0 else _cut(row, trajectory.block_size))
    return rows


def _cut(row: _Row, block_size: int) -> _Row:
    """The row up to its last block with a trained position; its first block if there is none."""
    trained = row.is_trained_T.nonzero()
    last = int(trained[-1]) if len(trained) else 0
    return _Row(*(tensor[: round_up_to_grid(last + 1, block_size)] for tensor in row))
