"""Block by block, step by step: decoding a batch of prompts with the student.

The algorithm:

    prefill the whole blocks of each prompt into the cache
    while some sequence is not done:
        forward the current block of each, with its previous block in front where that one has just become clean
        draw a token at every masked position; commit those the remasking strategy selects
        a block without masks is finished: stop at an end token or at the last block, else go on to the next block

The forward that takes the first step of a block is the one that writes the clean block before it into the cache, so no
forward is spent on committing alone, and none follows the last block. Sequences in different phases share a forward.

Under pipeline parallelism the sequences form groups that take turns (`rollout.turns`): while the next stage works on
one group, this stage works on another. The last stage draws and tells the others, so all commit the same.

Legend: `B` sequences of the batch, `A` of them active, `K` block, `L` cache length, `M` masked positions, `S` steps.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.diffusion.blocks import block_start, commit_schedule, round_up_to_grid
from megatron_opdlm.diffusion.logit_shift import predicting_outputs
from megatron_opdlm.diffusion.remasking import select_commits
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.device import device
from megatron_opdlm.parallel.stage_link import Shared
from megatron_opdlm.rollout.forward import cached_forward, vocabulary_shard
from megatron_opdlm.rollout.kv_cache import KeyValueCache, QueryTokens, attached
from megatron_opdlm.rollout.rounds import begin_round
from megatron_opdlm.rollout.token_sampling import Draws, draw_tokens
from megatron_opdlm.rollout.turns import Work, take_turns

PREFILL_TOKENS = 16384
"""Rows times longest prompt of one prefill forward: bounds its attention mask and activations."""


@dataclass(frozen=True)
class DecodingRequest:
    """One sequence to decode."""

    prompt_id: int
    prompt_ids: list[int]
    max_new_tokens: int
    generator: torch.Generator
    """Of this sequence alone, so its draws do not depend on the rest of the batch."""
    sample_index: int = 0
    domain: str = ""


class BlockDecoder:
    """The state of a batch of sequences while it is decoded.

    `decode()` runs under the caller's no_grad; all ranks of a tensor- and of a pipeline-parallel group must decode the
    same requests.
    """

    def __init__(
        self, model: PipelineModel, requests: list[DecodingRequest], rollout: RolloutConfig, special: SpecialTokens
    ) -> None:
        self.model, self.requests, self.rollout, self.special = model, requests, rollout, special
        block_size = rollout.block_size
        self.device = device()
        prompt_lengths = [len(request.prompt_ids) for request in requests]
        ends = [
            round_up_to_grid(length + request.max_new_tokens, block_size)
            for length, request in zip(prompt_lengths, requests, strict=True)
        ]
        self.prompt_lengths_B = torch.tensor(prompt_lengths, device=self.device)
        self.ends_B = torch.tensor(ends, device=self.device)
        self.ids_BL = torch.full((len(requests), max(ends)), special.mask_token_id, device=self.device)
        for row, request in enumerate(requests):
            self.ids_BL[row, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids, device=self.device)
        self.is_masked_BL = torch.arange(max(ends), device=self.device) >= self.prompt_lengths_B[:, None]
        self.step_map_BL = torch.zeros_like(self.ids_BL)
        self.log_probs_BL = torch.zeros(self.ids_BL.shape, device=self.device)
        self.block_start_B = block_start(self.prompt_lengths_B, block_size)
        self.step_B = torch.zeros_like(self.prompt_lengths_B)
        self.previous_is_fresh_B = torch.zeros_like(self.prompt_lengths_B, dtype=torch.bool)
        self.is_active_B = torch.ones_like(self.previous_is_fresh_B)
        self.uniforms_BSK = torch.zeros(
            len(requests), rollout.denoising_steps_per_block, block_size, dtype=torch.float64, device=self.device
        )
        self.schedule_S = commit_schedule(block_size, rollout.denoising_steps_per_block, self.device)
        self.end_ids = torch.tensor(special.end_token_ids, device=self.device)
        self.offsets_K = torch.arange(block_size, device=self.device)
        self.num_forwards = 0
        self.output_before_BH: torch.Tensor | None = None
        """The last stage's output at the position before each row's block, where the logits are shifted."""

    def decode(self) -> list[Trajectory]:
        """The trajectories of the requests, in their order."""
        cache = KeyValueCache(len(self.requests), self.ids_BL.shape[1], self.rollout.block_size)
        with attached(self.model, cache):
            take_turns(self._prefill(cache, rows_A) for rows_A in self._prefill_batches())
            take_turns(self._decode_group(cache, rows_A) for rows_A in self._groups())
        return [self._trajectory(row) for row in range(len(self.requests))]

    def _prefill_batches(self) -> list[torch.Tensor]:
        """The rows whose prompts have whole blocks, those of similar length together."""
        lengths, batches = self.block_start_B.tolist(), []
        rows = sorted((row for row in range(len(lengths)) if lengths[row]), key=lambda row: lengths[row])
        while rows:
            num_rows = max(1, min(len(rows), PREFILL_TOKENS // lengths[rows[-1]]))
            rows, batch = rows[:-num_rows], rows[-num_rows:]
            batches.append(torch.tensor(sorted(batch), device=self.device))
        return batches

    def _prefill(self, cache: KeyValueCache, rows_A: torch.Tensor) -> Work:
        """Caches the whole blocks of the rows' prompts."""
        ends_A = self.block_start_B[rows_A]
        is_read = torch.arange(int(ends_A.max()), device=self.device) < ends_A[:, None]
        hidden_TH = yield from self._forward(cache, rows_A, is_read, torch.zeros_like(rows_A))
        self._keep_outputs_before(rows_A, hidden_TH, is_read.sum(1).cumsum(0) - 1)

    def _groups(self) -> list[torch.Tensor]:
        """The rows that share forwards. Neighbours, which are of similar length, go to different groups."""
        rows = torch.arange(len(self.requests), device=self.device)
        num_groups = min(self.rollout.pipeline_micro_groups or self.model.link.num_stages, len(rows))
        return [rows[first::num_groups] for first in range(num_groups)]

    def _decode_group(self, cache: KeyValueCache, rows_A: torch.Tensor) -> Work:
        """Denoises block after block of the rows, until the last of them is done."""
        self._draw_uniforms(rows_A)
        while len(rows_A):
            yield from self._denoise(cache, rows_A)
            self._advance(rows_A)
            rows_A = rows_A[self.is_active_B[rows_A]]

    def _forward(
        self, cache: KeyValueCache, rows_A: torch.Tensor, is_read: torch.Tensor, start_A: torch.Tensor
    ) -> Generator[None, None, torch.Tensor | None]:
        """Hidden states `[T, H]` of the positions `start + column` of each row where `is_read [A, columns]`.

        On the last pipeline stage, None on the others.
        """
        row_index, column = is_read.nonzero(as_tuple=True)
        rows_T = rows_A[row_index]
        positions_T = column + start_A[row_index]
        self.num_forwards += 1
        begin_round(self.model)
        tokens = QueryTokens(self.ids_BL[rows_T, positions_T], rows_T, positions_T)
        return (yield from cached_forward(self.model, cache, tokens))

    def _denoise(self, cache: KeyValueCache, rows_A: torch.Tensor) -> Work:
        """One denoising step of every given row: forward, draw, commit."""
        block_size, schedule_S = self.rollout.block_size, self.schedule_S
        positions_AK = self.block_start_B[rows_A, None] + self.offsets_K
        is_masked_AK = self.is_masked_BL[rows_A[:, None], positions_AK]
        step_A = self.step_B[rows_A]
        previous_AK = self.previous_is_fresh_B[rows_A, None].expand_as(is_masked_AK)
        is_read = torch.cat([previous_AK, torch.ones_like(previous_AK)], dim=1)
        hidden_TH = yield from self._forward(cache, rows_A, is_read, self.block_start_B[rows_A] - block_size)
        hidden_MH = self._predicting_outputs(rows_A, hidden_TH, is_read, is_masked_AK)
        uniforms_M = self.uniforms_BSK[rows_A, step_A][is_masked_AK]
        shared = self._draw(hidden_MH, uniforms_M)
        if self.model.link.num_stages > 1:
            yield
        draws = _received(shared)
        log_probs_AK = torch.full(is_masked_AK.shape, float("-inf"), device=self.device)
        log_probs_AK[is_masked_AK] = draws.log_probs_N
        is_committed_AK = select_commits(
            self.rollout.remasking_strategy,
            log_probs_AK.exp(),
            is_masked_AK,
            schedule_S[step_A],
            step_A == len(schedule_S) - 1,
            dynamic_threshold=self.rollout.dynamic_threshold,
            entropy_BK=self._entropies(draws, is_masked_AK),
            entropy_bound=self.rollout.entropy_bound,
        )
        self._commit(rows_A, positions_AK, is_masked_AK, is_committed_AK, draws.ids_N, log_probs_AK)

    def _predicting_outputs(
        self, rows_A: torch.Tensor, hidden_TH: torch.Tensor | None, is_read: torch.Tensor, is_masked_AK: torch.Tensor
    ) -> torch.Tensor | None:
        """The outputs `[M, H]` that predict the masked positions, on the last pipeline stage."""
        if hidden_TH is None:
            return None
        block_size, is_fresh_A = self.rollout.block_size, self.previous_is_fresh_B[rows_A]
        ends_A = is_read.sum(1).cumsum(0)
        self._keep_outputs_before(rows_A[is_fresh_A], hidden_TH, ends_A[is_fresh_A] - block_size - 1)
        own_AKH = hidden_TH[ends_A[:, None] - block_size + self.offsets_K]
        before_AH = None if self.output_before_BH is None else self.output_before_BH[rows_A]
        return predicting_outputs(own_AKH, before_AH, self.rollout.logit_shift)[is_masked_AK]

    def _keep_outputs_before(
        self, rows_A: torch.Tensor, hidden_TH: torch.Tensor | None, places_A: torch.Tensor
    ) -> None:
        """Keeps the outputs at these places of the list: later steps of the block do not read that position again."""
        if self.rollout.logit_shift == "next_token" and hidden_TH is not None:
            if self.output_before_BH is None:
                self.output_before_BH = hidden_TH.new_zeros(len(self.requests), hidden_TH.shape[1])
            self.output_before_BH[rows_A] = hidden_TH[places_A]

    def _draw(self, hidden_MH: torch.Tensor | None, uniforms_M: torch.Tensor) -> Shared:
        """Begins to tell all pipeline stages what the last one, which has the hidden states, draws."""
        with_entropy = self.rollout.remasking_strategy == "entropy_bounded"
        if hidden_MH is None:
            drawn = torch.empty(2 + with_entropy, len(uniforms_M), dtype=torch.float64, device=self.device)
        else:
            draws = draw_tokens(
                self.model.vocab_parallel_logits(hidden_MH).float(),
                uniforms_M,
                torch.full(uniforms_M.shape, self.rollout.temperature, device=self.device),
                vocabulary_shard(self.model, self.special),
                top_k=self.rollout.top_k,
                top_p=self.rollout.top_p,
                with_entropy=with_entropy,
            )
            entropies = [draws.entropies_N] if with_entropy else []
            drawn = torch.stack([draws.ids_N.double(), draws.log_probs_N, *entropies])  # float64 holds all exactly
        return self.model.link.share(drawn)

    def _entropies(self, draws: Draws, is_masked_AK: torch.Tensor) -> torch.Tensor | None:
        """At each position; None where the strategy does not look at them."""
        if draws.entropies_N is None:
            return None
        entropies_AK = torch.zeros(is_masked_AK.shape, device=self.device)
        entropies_AK[is_masked_AK] = draws.entropies_N
        return entropies_AK

    def _commit(
        self,
        rows_A: torch.Tensor,
        positions_AK: torch.Tensor,
        is_masked_AK: torch.Tensor,
        is_committed_AK: torch.Tensor,
        ids_M: torch.Tensor,
        log_probs_AK: torch.Tensor,
    ) -> None:
        """Writes the committed tokens, and with each its step and log-probability."""
        row_index, column = is_committed_AK.nonzero(as_tuple=True)
        place = rows_A[row_index], positions_AK[row_index, column]
        self.ids_BL[place] = ids_M[is_committed_AK[is_masked_AK]]
        self.log_probs_BL[place] = log_probs_AK[row_index, column]
        self.step_map_BL[place] = self.step_B[rows_A][row_index] + 1
        self.is_masked_BL[place] = False
        self.step_B[rows_A] += 1
        self.previous_is_fresh_B[rows_A] = False

    def _advance(self, rows_A: torch.Tensor) -> None:
        """Rows whose block is finished stop or go on to the next block."""
        positions_AK = self.block_start_B[rows_A, None] + self.offsets_K
        is_finished_A = ~self.is_masked_BL[rows_A[:, None], positions_AK].any(1)
        is_end_AK = torch.isin(self.ids_BL[rows_A[:, None], positions_AK], self.end_ids)
        has_ended_A = (is_end_AK & (positions_AK >= self.prompt_lengths_B[rows_A, None])).any(1)
        is_last_A = positions_AK[:, -1] + 1 >= self.ends_B[rows_A]
        is_done_A = is_finished_A & (has_ended_A | is_last_A)
        self.is_active_B[rows_A[is_done_A]] = False
        next_rows = rows_A[is_finished_A & ~is_done_A]
        self.block_start_B[next_rows] += self.rollout.block_size
        self.step_B[next_rows] = 0
        self.previous_is_fresh_B[next_rows] = True
        self._draw_uniforms(next_rows)

    def _draw_uniforms(self, rows: torch.Tensor) -> None:
        """The uniform numbers of a whole block, whichever of them its steps use: see `DecodingRequest.generator`."""
        shape = self.uniforms_BSK.shape[1:]
        if len(rows):
            drawn = [
                torch.rand(shape, dtype=torch.float64, generator=self.requests[r].generator) for r in rows.tolist()
            ]
            self.uniforms_BSK[rows] = torch.stack(drawn).to(rows.device)

    def _trajectory(self, row: int) -> Trajectory:
        request, start = self.requests[row], len(self.requests[row].prompt_ids)
        end = int(self.block_start_B[row]) + self.rollout.block_size
        response = self.ids_BL[row, start:end]
        is_end = torch.isin(response[: request.max_new_tokens], self.end_ids)
        has_ended = bool(is_end.any())
        return Trajectory(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            prompt_length=start,
            block_size=self.rollout.block_size,
            terminal_ids_T=self.ids_BL[row, :end].cpu(),
            step_map_R=self.step_map_BL[row, start:end].cpu(),
            log_probs_R=self.log_probs_BL[row, start:end].cpu(),
            response_length=int(is_end.int().argmax()) + 1 if has_ended else len(is_end),
            stop_reason="end_token" if has_ended else "length",
            domain=request.domain,
        )


def _received(shared: Shared) -> Draws:
    ids_M, log_probs_M, *entropies = shared.wait()
    return Draws(ids_M.long(), log_probs_M.float(), *(entropies_M.float() for entropies_M in entropies))
