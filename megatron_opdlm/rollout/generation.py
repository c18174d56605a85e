"""One rollout on this rank, from the requests to their trajectories.

    queue = WorkQueue([request.longest(4) for request in requests], group)
    generation = Generation(model, rollout, special, requests, queue, choose_attention(rollout, model.config, device))
    finished = generation.run()                    # {index of a request: its trajectory}, those decoded here
    generation.statistics.num_forwards

The slots, and with them the pages of the cache, are parted among as many decoders as there are pipeline stages, which
take turns (`rollout.turns`); without a pipeline there is one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from tqdm import tqdm

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.device import device
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard
from megatron_opdlm.rollout.attention_choice import BuildAttention
from megatron_opdlm.rollout.block_decoder import BlockDecoder
from megatron_opdlm.rollout.cache_size import CacheSize, cache_size
from megatron_opdlm.rollout.denoising_step import DenoisingStep
from megatron_opdlm.rollout.forward_graphs import CudaCapture, ForwardGraphs, graphs_refusal
from megatron_opdlm.rollout.kv_cache import KeyValueCache, attached
from megatron_opdlm.rollout.page_pool import PagePool
from megatron_opdlm.rollout.rounds import on_any
from megatron_opdlm.rollout.scheduler import Scheduler
from megatron_opdlm.rollout.sequences import DecodingRequest, Slots, Waiting
from megatron_opdlm.rollout.statistics import RolloutStatistics
from megatron_opdlm.rollout.turns import take_turns
from megatron_opdlm.rollout.work_queue import WorkQueue

logger = logging.getLogger(__name__)

ROUNDS_BETWEEN_DEALS = 16
"""Forwards after which data-parallel ranks tell each other how much room they have, while tasks are left."""
ROUNDS_BETWEEN_QUESTIONS = 32
"""Forwards after which ranks ask whether they shall stop, once no tasks are left; a pipeline runs empty there."""
SLOTS_PER_TASK_IN_STOCK = 8
"""A rank takes one task for this many slots beyond the free ones, for slots that empty before the next deal."""


class Generation:
    """What lives as long as a rollout. Runs in the caller's `no_grad` or inference mode.

    All ranks of a tensor- and of a pipeline-parallel group need the same requests, and those of the queue's group too.
    """

    def __init__(
        self,
        model: PipelineModel,
        rollout: RolloutConfig,
        special: SpecialTokens,
        requests: list[DecodingRequest],
        queue: WorkQueue,
        build_attention: BuildAttention,
        show_progress: bool = False,
        log_level: int = logging.DEBUG,
        on_finished: Callable[[int, Trajectory], None] | None = None,
        on_step: Callable[[DenoisingStep], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self.log_level, self.on_finished, self.on_step = log_level, on_finished, on_step
        self.should_stop = should_stop
        self.model, self.rollout, self.special, self.requests, self.queue = model, rollout, special, requests, queue
        self.statistics = RolloutStatistics.of_blocks(rollout.block_size)
        self.waiting: deque[Waiting] = deque()
        self.finished: dict[int, Trajectory] = {}
        self.num_slots = max(1, min(rollout.batch_size, -(-len(requests) // queue.num_ranks)))
        self.longest = max((request.longest(rollout.block_size) for request in requests), default=rollout.block_size)
        self.attention = build_attention(self.longest)
        self.bar = tqdm(desc="rollout", unit=" sequences", total=0, leave=False, delay=5, disable=not show_progress)

    def run(self) -> dict[int, Trajectory]:
        """Decodes, all or as much as `should_stop` leaves time for.

        All ranks of the queue's group must call it, and all that share experts.
        """
        link, started = self.model.link, time.perf_counter()
        link.clock.take()
        decoders, cache = self._build()
        with attached(self.model, cache), self.bar:
            is_going_on = True  # also without requests: keeps company where experts are shared
            while is_going_on:
                if not self.queue.is_empty:
                    self._take_requests(decoders)
                if self.queue.is_stopped:
                    break
                num_rounds = self._rounds_to_next_meeting()
                take_turns(decoder.decode(num_rounds) for decoder in decoders)
                is_going_on = num_rounds is not None and self._is_going_on(decoders)
        self._finish_statistics(decoders, time.perf_counter() - started)
        return self.finished

    def _rounds_to_next_meeting(self) -> int | None:
        if not self.queue.is_empty:
            return ROUNDS_BETWEEN_DEALS
        return None if self.should_stop is None else ROUNDS_BETWEEN_QUESTIONS

    def _is_going_on(self, decoders: list[BlockDecoder]) -> bool:
        """Whether there is something left to decode, and none of the ranks that forward together is to stop."""
        if self.should_stop is None:
            return True
        is_left = bool(self.waiting) or any(decoder.scheduler.num_active for decoder in decoders)
        is_left, is_told_to_stop = on_any([is_left or not self.queue.is_empty, self.should_stop()], self.model)
        if is_told_to_stop:
            self.queue.stop()
        return is_left and not is_told_to_stop

    def _take_requests(self, decoders: list[BlockDecoder]) -> None:
        """Gets requests for free slots and for stock, and spreads neighbours over the decoders.

        They come the longest first. Those that get a slot right away, where each has one page, are put in the order of
        the prompt tokens in their first block.
        """
        num_held = len(self.waiting) + sum(decoder.scheduler.num_active for decoder in decoders)
        room = self.num_slots + self.num_slots // SLOTS_PER_TASK_IN_STOCK - num_held
        dealt = [Waiting(self.requests[index]) for index in self.queue.deal(max(room, 0))]
        if self.longest <= self.attention.page_size:
            # What has as many of them finishes this block, and under static remasking all others, in the same steps:
            # pages side by side are read without a copy when these blocks are committed.
            room = max(0, sum(decoder.scheduler.room() for decoder in decoders) - len(self.waiting))
            dealt[:room] = sorted(dealt[:room], key=self._tokens_in_first_block)
        self.waiting.extend(dealt)
        self.bar.total += len(dealt)
        while sum(decoder.scheduler.admit(at_most=1) for decoder in decoders):
            pass

    def _tokens_in_first_block(self, waiting: Waiting) -> int:
        return len(waiting.request.prompt_ids) % self.rollout.block_size

    def _build(self) -> tuple[list[BlockDecoder], KeyValueCache]:
        num_decoders = self.rollout.pipeline_micro_groups or self.model.link.num_stages
        num_slots = -(-self.num_slots // num_decoders)
        size = self._cache_size(num_decoders, num_slots)
        cache = KeyValueCache(num_decoders * size.num_pages + 1, self.attention, device())
        self.graphs = self._graphs(cache, num_slots)
        self.statistics.num_pages = num_decoders * size.num_pages
        return [self._decoder(cache, size, num_slots, place) for place in range(num_decoders)], cache

    def _decoder(self, cache: KeyValueCache, size: CacheSize, num_slots: int, place: int) -> BlockDecoder:
        pages = range(1 + place * size.num_pages, 1 + (place + 1) * size.num_pages)
        pool = PagePool(pages, num_slots, size.pages_of_longest, self.attention.page_size)
        slots = Slots(num_slots, self.longest, self.rollout, self.special)
        return BlockDecoder(
            self.model,
            cache,
            Scheduler(slots, pool, self.waiting, self.rollout),
            self.rollout,
            self.special,
            _vocabulary_shard(self.model, self.special),
            self.statistics,
            self._keep,
            self.graphs,
            self.on_step,
        )

    def _graphs(self, cache: KeyValueCache, num_slots: int) -> ForwardGraphs | None:
        """For forwards that read a block of each slot, and one that has just become clean."""
        reason = graphs_refusal(self.model, self.attention, device()) if self.rollout.cuda_graphs else "not asked for"
        if reason:
            logger.debug("rollout.cuda_graphs: none: %s", reason)
            return None
        return ForwardGraphs(self.model, cache, self.rollout.block_size, 2 * num_slots, CudaCapture())

    def _cache_size(self, num_decoders: int, num_slots: int) -> CacheSize:
        size = cache_size(
            self.model,
            page_size=self.attention.page_size,
            longest=self.longest,
            num_slots=num_slots,
            num_decoders=num_decoders,
            cache_gib=self.rollout.cache_gib,
        )
        logger.log(
            self.log_level,
            "key-value cache: %.3g GiB, %d pages of %d tokens, for up to %d sequences of up to %d tokens",
            size.gib,
            num_decoders * size.num_pages,
            self.attention.page_size,
            num_decoders * num_slots,
            self.longest,
        )
        return size

    def _keep(self, index: int, trajectory: Trajectory) -> None:
        """What a decoder has finished."""
        self.finished[index] = trajectory
        if self.on_finished is not None:
            self.on_finished(index, trajectory)
        self.statistics.num_tokens += trajectory.response_length
        self.bar.update()
        elapsed = self.bar.format_dict["elapsed"]
        if elapsed:
            self.bar.set_postfix_str(f"{self.statistics.num_tokens / elapsed:.0f} tokens/s", refresh=False)

    def _finish_statistics(self, decoders: list[BlockDecoder], seconds: float) -> None:
        self.statistics.seconds = seconds
        self.statistics.num_pairs = self.attention.num_pairs
        self.statistics.num_hidden_pairs = self.attention.num_hidden_pairs
        self.statistics.num_replays = self.graphs.num_replays if self.graphs is not None else 0
        self.statistics.num_preemptions = sum(decoder.scheduler.num_preemptions for decoder in decoders)
        self.statistics.peak_pages = sum(decoder.scheduler.pool.peak for decoder in decoders)
        if self.model.link.num_stages > 1:
            self.statistics.pipeline_bubble = self.model.link.idle_share(seconds)


def _vocabulary_shard(model: PipelineModel, special: SpecialTokens) -> VocabularyShard:
    """This rank's rows of the output layer."""
    num_rows = model.chunks[0].vocab_size // model.tensor_group.size()
    return VocabularyShard(
        first=model.tensor_group.rank() * num_rows,
        num_rows=num_rows,
        vocab_size=special.vocab_size,
        mask_token_id=special.mask_token_id,
        group=model.tensor_group,
    )
