"""Block by block, step by step: decoding sequences with the student.

The algorithm:

    while some sequence is waiting or not done:
        waiting sequences take the slots and the pages that are free
        forward what the scheduler plans: the clean tokens each sequence lacks in the cache, and behind them its block
        draw a token at every masked position; commit those the remasking strategy selects
        a block without masks is finished: stop at an end token or at the last block, else go on to the next block

The forward that takes the first step of a block is the one that writes the clean block before it into the cache, so no
forward is spent on committing alone, and none follows the last block. Sequences in different phases share a forward.
What has been decoded lies in host memory; per forward, one small copy brings the draws there.

Under pipeline parallelism several decoders take turns (`rollout.turns`): while the next stage works on the sequences of
one, this stage works on those of another. The last stage draws and tells the others, so all commit the same.

Legend: `A` sequences of a forward, `D` of them that denoise, `K` block, `M` masked positions, `T` tokens of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

import torch

from megatron_opdlm.config.limits import drawn_together
from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.diffusion.blocks import commit_schedule
from megatron_opdlm.diffusion.logit_shift import predicting_outputs
from megatron_opdlm.diffusion.remasking import select_commits
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.device import to_device
from megatron_opdlm.parallel.stage_link import Shared
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard
from megatron_opdlm.rollout.denoising_step import DenoisingStep, steps_taken
from megatron_opdlm.rollout.forward import cached_forward
from megatron_opdlm.rollout.forward_graphs import ForwardGraphs
from megatron_opdlm.rollout.kv_cache import KeyValueCache, QueryTokens, listed
from megatron_opdlm.rollout.rounds import COMPANY, is_anyone_decoding
from megatron_opdlm.rollout.scheduler import ForwardPlan, Scheduler
from megatron_opdlm.rollout.statistics import RolloutStatistics
from megatron_opdlm.rollout.token_sampling import Draws, draw_tokens
from megatron_opdlm.rollout.turns import Work


class BlockDecoder:
    """Decodes what its scheduler hands it. Runs in the caller's `no_grad` or inference mode, with the cache attached.

    All ranks of a tensor- and of a pipeline-parallel group must decode the same sequences.
    """

    def __init__(
        self,
        model: PipelineModel,
        cache: KeyValueCache,
        scheduler: Scheduler,
        rollout: RolloutConfig,
        special: SpecialTokens,
        shard: VocabularyShard,
        statistics: RolloutStatistics,
        on_finished: Callable[[int, Trajectory], None],
        graphs: ForwardGraphs | None = None,
        on_step: Callable[[DenoisingStep], None] | None = None,
    ) -> None:
        self.model, self.cache, self.scheduler, self.slots = model, cache, scheduler, scheduler.slots
        self.rollout, self.special, self.shard = rollout, special, shard
        self.statistics, self.on_finished, self.graphs = statistics, on_finished, graphs
        self.on_step = on_step
        self.schedule_S = commit_schedule(rollout.block_size, rollout.denoising_steps_per_block)
        self.output_before_BH: torch.Tensor | None = None
        """The last stage's output at the position before each slot's block, where the logits are shifted."""

    def decode(self, num_rounds: int | None = None) -> Work:
        """Up to so many forwards, or as many as it takes; returns when no sequence is left."""
        while num_rounds is None or num_rounds > 0:
            self.scheduler.admit()
            plan = self.scheduler.plan()
            for pages in self.scheduler.take_pages_given_back():
                self.cache.clear(pages)
            if not is_anyone_decoding(self.model, plan is not None):
                return
            yield from self._keep_company() if plan is None else self._take_step(plan)
            num_rounds = None if num_rounds is None else num_rounds - 1

    def _keep_company(self) -> Work:
        """A forward for the sake of others, in as many turns as one that decodes."""
        yield from cached_forward(self.model, self.cache, self.cache.place(COMPANY))
        if self.model.link.num_stages > 1:
            yield

    def _take_step(self, plan: ForwardPlan) -> Work:
        """One forward; draws and commits for the sequences that denoise in it."""
        slots_D = plan.slots_A[plan.is_denoising_A]
        is_masked_DK = self.slots.is_masked_BL[slots_D[:, None], self.slots.positions_of_blocks(slots_D)]
        tokens = self._query_tokens(plan, is_masked_DK)
        hidden_NH = yield from self._forward(tokens)
        self.slots.num_cached_B[plan.slots_A] += plan.num_clean_A
        self._count(plan, tokens)
        hidden_MH = self._predicting_outputs(plan, tokens, hidden_NH, is_masked_DK)
        shared = self._draw(hidden_MH, slots_D, is_masked_DK)
        if self.model.link.num_stages > 1:
            yield
        drawn_3M = shared.wait().cpu()
        if len(slots_D):
            self._commit(slots_D, is_masked_DK, drawn_3M)
            for slot in self.slots.advance(slots_D).tolist():
                if self.slots.is_sick_B[slot]:
                    self.cache.clear(self.scheduler.pool.page_table_BP[slot])
                self.on_finished(*self.scheduler.finish(slot))

    def _forward(self, tokens: QueryTokens) -> Generator[None, None, torch.Tensor | None]:
        """`cached_forward`, as a replayed graph where there is one."""
        self.model.num_forwards += 1
        if self.graphs is not None and self.graphs.takes(tokens):
            return self.graphs.forward(tokens)
        return (yield from cached_forward(self.model, self.cache, self.cache.place(tokens)))

    def _query_tokens(self, plan: ForwardPlan, is_masked_DK: torch.Tensor) -> QueryTokens:
        first_A = self.slots.num_cached_B[plan.slots_A]
        counts_A = plan.num_clean_A + self.rollout.block_size * (plan.is_denoising_A & self.rollout.reads_block)
        sequence_T, positions_T = listed(first_A, counts_A)
        ids_T = self.slots.ids_BL[plan.slots_A[sequence_T], positions_T]
        tokens = QueryTokens(ids_T, first_A, counts_A, self.scheduler.pool.page_table_BP[plan.slots_A])
        # where the logits are shifted, outputs are read now and kept for later; experts are asked about one at least
        if self.rollout.logit_shift != "none" or not len(is_masked_DK):
            return tokens
        return replace(tokens, read_N=self._places_of_blocks(plan, tokens)[is_masked_DK])

    def _places_of_blocks(self, plan: ForwardPlan, tokens: QueryTokens) -> torch.Tensor:
        """Where in the list the blocks `[D, K]` are, at the end of their sequences' parts of it."""
        ends_D = (tokens.starts_A + tokens.counts_A)[plan.is_denoising_A]
        return ends_D[:, None] - self.rollout.block_size + torch.arange(self.rollout.block_size)

    def _predicting_outputs(
        self, plan: ForwardPlan, tokens: QueryTokens, hidden_TH: torch.Tensor | None, is_masked_DK: torch.Tensor
    ) -> torch.Tensor | None:
        """The outputs `[M, H]` that predict the masked positions, on the last pipeline stage, of those read."""
        if hidden_TH is None or self.rollout.logit_shift == "none":
            return hidden_TH
        before_DH = self._outputs_before(plan, tokens, hidden_TH)
        if self.rollout.reads_block:
            own_DKH = hidden_TH[to_device(self._places_of_blocks(plan, tokens), hidden_TH.device)]
        else:
            own_DKH = before_DH[:, None]
        outputs_NH = predicting_outputs(own_DKH, before_DH, self.rollout.logit_shift).flatten(0, 1)
        return outputs_NH[to_device(is_masked_DK.flatten().nonzero()[:, 0], hidden_TH.device)]

    def _outputs_before(self, plan: ForwardPlan, tokens: QueryTokens, hidden_TH: torch.Tensor) -> torch.Tensor:
        """The outputs `[D, H]` at the position before each block, where the logits are shifted.

        They are kept, for the later steps of a block do not read that position again.
        """
        if self.output_before_BH is None:
            self.output_before_BH = hidden_TH.new_zeros(len(self.slots.requests), hidden_TH.shape[1])
        is_fresh_A = plan.num_clean_A > 0
        last_clean_A = (tokens.starts_A + plan.num_clean_A - 1)[is_fresh_A]
        fresh_slots, last_clean, slots_D = (
            to_device(indices, hidden_TH.device)
            for indices in (plan.slots_A[is_fresh_A], last_clean_A, plan.slots_A[plan.is_denoising_A])
        )
        self.output_before_BH[fresh_slots] = hidden_TH[last_clean]
        return self.output_before_BH[slots_D]

    def _draw(self, hidden_MH: torch.Tensor | None, slots_D: torch.Tensor, is_masked_DK: torch.Tensor) -> Shared:
        """Begins to tell all pipeline stages what the last one, which has the hidden states, draws.

        float64 `[3, M]`, which holds them all exactly: token ids, log-probabilities, entropies.
        """
        row_M, column_M = is_masked_DK.nonzero(as_tuple=True)
        slots_M, device = slots_D[row_M], self.cache.device
        if hidden_MH is None or not len(slots_M):
            return self.model.link.share(torch.empty(3, len(slots_M), dtype=torch.float64, device=device))
        uniforms_M = to_device(self.slots.uniforms_BSK[slots_M, self.slots.step_B[slots_M], column_M], device)
        temperatures_M = self.slots.temperature_B[slots_M]
        is_greedy, temperatures_M = not temperatures_M.any(), to_device(temperatures_M, device)
        together = drawn_together(self.shard.num_rows)
        drawn = [
            draw_tokens(
                self.model.vocab_parallel_logits(hidden_NH).float(),
                uniforms_N,
                None if is_greedy else temperatures_N,
                self.shard,
                top_k=self.rollout.top_k,
                top_p=self.rollout.top_p,
                with_entropy=self.rollout.remasking_strategy == "entropy_bounded",
            )
            for hidden_NH, uniforms_N, temperatures_N in zip(
                *(x.split(together) for x in (hidden_MH, uniforms_M, temperatures_M)), strict=True
            )
        ]
        return self.model.link.share(torch.cat([_as_numbers(draws) for draws in drawn], dim=1))

    def _commit(self, slots_D: torch.Tensor, is_masked_DK: torch.Tensor, drawn_3M: torch.Tensor) -> None:
        """Writes the tokens that the strategy selects, and with each its step and log-probability.

        A block with a logit that is not finite, which leaves no log-probability finite there, is filled with padding.
        """
        drawn_3DK = torch.zeros(3, *is_masked_DK.shape, dtype=torch.float64)
        drawn_3DK[:, is_masked_DK] = drawn_3M
        ids_DK, log_probs_DK, entropy_DK = drawn_3DK[0].long(), drawn_3DK[1].float(), drawn_3DK[2].float()
        is_sick_D = (~log_probs_DK.isfinite()).any(1)
        ids_DK[is_sick_D], log_probs_DK[is_sick_D], entropy_DK[is_sick_D] = self.special.pad_token_id, 0.0, 0.0
        step_D = self.slots.step_B[slots_D]
        is_committed_DK = select_commits(
            self.rollout.remasking_strategy,
            log_probs_DK.exp(),
            is_masked_DK,
            self.schedule_S[step_D],
            step_D == len(self.schedule_S) - 1,
            dynamic_threshold=self.rollout.dynamic_threshold,
            entropy_BK=entropy_DK,
            entropy_bound=self.rollout.entropy_bound,
        )
        is_committed_DK |= is_masked_DK & is_sick_D[:, None]
        self.slots.is_sick_B[slots_D] = is_sick_D
        row, column = is_committed_DK.nonzero(as_tuple=True)
        place = slots_D[row], self.slots.block_start_B[slots_D[row]] + column
        self.slots.ids_BL[place] = ids_DK[is_committed_DK]
        self.slots.log_probs_BL[place] = log_probs_DK[is_committed_DK]
        self.slots.step_map_BL[place] = step_D[row] + 1
        self.slots.is_masked_BL[place] = False
        self.slots.step_B[slots_D] += 1
        self.statistics.offered_K += is_masked_DK.sum(0)
        self.statistics.committed_K += is_committed_DK.sum(0)
        if self.on_step is not None:
            for step in steps_taken(self.slots, slots_D, is_committed_DK):
                self.on_step(step)

    def _count(self, plan: ForwardPlan, tokens: QueryTokens) -> None:
        num_steps = int(plan.is_denoising_A.sum())
        self.statistics.num_forwards += 1
        self.statistics.num_prefill_forwards += num_steps == 0
        self.statistics.num_sequence_steps += num_steps
        self.statistics.num_query_tokens += len(tokens.ids_T)
        self.statistics.num_clean_tokens += int(plan.num_clean_A.sum())


def _as_numbers(draws: Draws) -> torch.Tensor:
    """float64 `[3, N]`; entropies are zero where nobody asked."""
    entropies_N = torch.zeros_like(draws.log_probs_N) if draws.entropies_N is None else draws.entropies_N
    return torch.stack([draws.ids_N.double(), draws.log_probs_N.double(), entropies_N.double()])
