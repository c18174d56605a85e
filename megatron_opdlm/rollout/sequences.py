"""The sequences that are being decoded, one slot each, in host memory.

What a sequence has come to lies in the rows of a few CPU tensors, so that one denoising step of all sequences is a few
vector operations, and neither deciding nor keeping books waits for a GPU. A sequence can leave its slot half way
(`suspend`) and go on in another one: its tokens, its step and its random numbers go with it.

    slots = Slots(num_slots=2, max_length=16, rollout=config.rollout, special=special)
    slots.begin(0, request)
    paused = slots.suspend(0)
    slots.resume(1, paused)
    trajectory = slots.finish(1)

Legend: `B` slots, `L` positions of the longest sequence, `S` denoising steps per block, `K` positions of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.diffusion.blocks import block_start, round_up_to_grid
from megatron_opdlm.diffusion.trajectory import Trajectory


@dataclass(frozen=True)
class DecodingRequest:
    """One sequence to decode."""

    index: int
    """Of the task that it answers."""
    prompt_id: int
    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float
    generator: torch.Generator
    """Of this sequence alone, so its draws do not depend on the rest of the batch."""
    sample_index: int = 0
    domain: str = ""

    def longest(self, block_size: int) -> int:
        """Tokens of the longest terminal sequence that it can become."""
        return round_up_to_grid(len(self.prompt_ids) + self.max_new_tokens, block_size)


@dataclass(frozen=True)
class Waiting:
    """A sequence without a slot: a request alone, or with the rows of a sequence that was suspended."""

    request: DecodingRequest
    rows: dict[str, torch.Tensor] | None = None


class Slots:
    """The state of the sequences in their slots; all tensors on the CPU."""

    def __init__(self, num_slots: int, max_length: int, rollout: RolloutConfig, special: SpecialTokens) -> None:
        self.block_size, self.special = rollout.block_size, special
        self.requests: list[DecodingRequest | None] = [None] * num_slots
        self.ids_BL = torch.full((num_slots, max_length), special.mask_token_id)
        self.is_masked_BL = torch.zeros(num_slots, max_length, dtype=torch.bool)
        self.step_map_BL = torch.zeros_like(self.ids_BL)
        self.log_probs_BL = torch.zeros(num_slots, max_length)
        self.prompt_length_B = torch.zeros(num_slots, dtype=torch.long)
        self.end_B = torch.zeros_like(self.prompt_length_B)
        """Where the longest terminal sequence ends."""
        self.block_start_B = torch.zeros_like(self.prompt_length_B)
        """First position of the block that is being denoised; all before it is clean."""
        self.step_B = torch.zeros_like(self.prompt_length_B)
        """Denoising steps that the block has taken."""
        self.temperature_B = torch.zeros(num_slots)
        self.uniforms_BSK = torch.zeros(
            num_slots, rollout.denoising_steps_per_block, self.block_size, dtype=torch.float64
        )
        """The uniform numbers of the block, one per step and position, whichever of them the steps use."""
        self.is_sick_B = torch.zeros(num_slots, dtype=torch.bool)
        """Whether a logit of the block was not finite; the sequence ends there."""
        self.num_cached_B = torch.zeros_like(self.prompt_length_B)
        """Clean tokens whose keys and values are in the cache; the only thing a suspended sequence loses."""
        self._end_ids = torch.tensor(special.end_token_ids)

    _ROWS = (
        "ids_BL",
        "is_masked_BL",
        "step_map_BL",
        "log_probs_BL",
        "prompt_length_B",
        "end_B",
        "block_start_B",
        "step_B",
        "temperature_B",
        "uniforms_BSK",
        "is_sick_B",
    )

    @property
    def occupied(self) -> torch.Tensor:
        """The slots that have a sequence, ascending."""
        return torch.tensor([slot for slot, request in enumerate(self.requests) if request], dtype=torch.long)

    def begin(self, slot: int, request: DecodingRequest) -> None:
        """Puts a sequence into an empty slot."""
        length, end = len(request.prompt_ids), request.longest(self.block_size)
        self.requests[slot] = request
        self.ids_BL[slot] = self.special.mask_token_id
        self.ids_BL[slot, :length] = torch.tensor(request.prompt_ids)
        self.is_masked_BL[slot] = self.is_sick_B[slot] = False
        self.is_masked_BL[slot, length:end] = True
        self.step_map_BL[slot] = 0
        self.prompt_length_B[slot], self.end_B[slot] = length, end
        self.block_start_B[slot] = block_start(length, self.block_size)
        self.step_B[slot] = self.num_cached_B[slot] = 0
        self.temperature_B[slot] = request.temperature
        self.draw_uniforms(torch.tensor([slot]))

    def suspend(self, slot: int) -> Waiting:
        """Empties a slot; what its sequence has come to is in the result."""
        request, self.requests[slot] = self.requests[slot], None
        return Waiting(request, {name: getattr(self, name)[slot].clone() for name in self._ROWS})

    def resume(self, slot: int, waiting: Waiting) -> None:
        """Puts a waiting sequence into an empty slot, to begin or to go on."""
        if waiting.rows is None:
            return self.begin(slot, waiting.request)
        self.requests[slot] = waiting.request
        for name, row in waiting.rows.items():
            getattr(self, name)[slot] = row
        self.num_cached_B[slot] = 0

    def draw_uniforms(self, slots: torch.Tensor) -> None:
        """New uniform numbers for a block of each of these slots, from the generators of their sequences.

        A sequence at temperature 0 draws nothing.
        """
        shape = self.uniforms_BSK.shape[1:]
        for slot in slots[self.temperature_B[slots] > 0].tolist():
            self.uniforms_BSK[slot] = torch.rand(shape, dtype=torch.float64, generator=self.requests[slot].generator)

    def positions_of_blocks(self, slots_A: torch.Tensor) -> torch.Tensor:
        """The positions `[A, K]` of the blocks that these slots denoise."""
        return self.block_start_B[slots_A, None] + torch.arange(self.block_size)

    def advance(self, slots_A: torch.Tensor) -> torch.Tensor:
        """Slots whose block is without masks go on to the next one. Returns those whose sequence is done instead."""
        positions_AK = self.positions_of_blocks(slots_A)
        place = slots_A[:, None], positions_AK
        is_clean_A = ~self.is_masked_BL[place].any(1)
        is_end_AK = torch.isin(self.ids_BL[place], self._end_ids) & (positions_AK >= self.prompt_length_B[place[0]])
        is_last_A = positions_AK[:, -1] + 1 >= self.end_B[slots_A]
        is_done_A = is_clean_A & (is_end_AK.any(1) | is_last_A | self.is_sick_B[slots_A])
        going_on = slots_A[is_clean_A & ~is_done_A]
        self.block_start_B[going_on] += self.block_size
        self.step_B[going_on] = 0
        self.draw_uniforms(going_on)
        return slots_A[is_done_A]

    def finish(self, slot: int) -> Trajectory:
        """Empties the slot of a sequence that is done."""
        request, self.requests[slot] = self.requests[slot], None
        start, end = len(request.prompt_ids), int(self.block_start_B[slot]) + self.block_size
        is_end = torch.isin(self.ids_BL[slot, start : start + request.max_new_tokens], self._end_ids)[: end - start]
        is_sick, has_ended = bool(self.is_sick_B[slot]), bool(is_end.any())
        length = int(is_end.int().argmax()) + 1 if has_ended else len(is_end)
        # what stands in the block of a sick sequence was not drawn; a response has one token at least
        clean_length = max(1, end - self.block_size - start)
        return Trajectory(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            prompt_length=start,
            block_size=self.block_size,
            terminal_ids_T=self.ids_BL[slot, :end].clone(),
            step_map_R=self.step_map_BL[slot, start:end].clone(),
            log_probs_R=self.log_probs_BL[slot, start:end].clone(),
            response_length=clean_length if is_sick else length,
            stop_reason="not_finite" if is_sick else "end_token" if has_ended else "length",
            domain=request.domain,
        )
