"""What a rollout has cost, and how its denoising steps went.

statistics = RolloutStatistics.of_blocks(block_size=4)
statistics.metrics().values()               # {"rollout/forwards_per_token": 0.26, ...}
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_opdlm.observability.metrics import MetricAccumulator


@dataclass
class RolloutStatistics:
    """Counts of one rollout on this rank; pipeline stages and tensor-parallel ranks count the same."""

    offered_K: torch.Tensor
    """How often the position at each place of a block was masked in a denoising step."""
    committed_K: torch.Tensor
    """How often it was committed."""
    num_forwards: int = 0
    """Of the model."""
    num_replays: int = 0
    """Those of them that a CUDA graph replayed."""
    num_prefill_forwards: int = 0
    """Forwards in which no sequence took a denoising step."""
    num_sequence_steps: int = 0
    """Denoising steps, added up over the sequences."""
    num_query_tokens: int = 0
    """Tokens that went through the layers."""
    num_clean_tokens: int = 0
    """Those of them that were clean: of prompts, of blocks that were committed, of what preemption threw away."""
    num_pairs: int = 0
    """Query-key pairs that attention has worked on, per layer and head."""
    num_hidden_pairs: int = 0
    """Those of them that a mask hid: keys that fill up a sequence, and what a prompt's tile may not see."""
    num_preemptions: int = 0
    """Times that a sequence had to give its pages back before it was done."""
    num_pages: int = 0
    """Pages of the cache."""
    peak_pages: int = 0
    """Most of them that were taken at one time."""
    num_tokens: int = 0
    """Response tokens that count."""
    seconds: float = 0.0
    """From the first prompt to the last response of this rank's."""
    idle_seconds: float = 0.0
    """From then on, until the last data-parallel rank was done."""
    pipeline_bubble: float | None = None
    """The share of the pipeline stages' time in which they waited for another stage; None without a pipeline."""

    @classmethod
    def of_blocks(cls, block_size: int) -> RolloutStatistics:
        """Nothing counted yet."""
        return cls(offered_K=torch.zeros(block_size, dtype=torch.long), committed_K=torch.zeros(block_size).long())

    def metrics(self) -> MetricAccumulator:
        """Shares and ratios; those of several ranks merge into the ones of all their sequences."""
        metrics, seconds = MetricAccumulator(), self.seconds + self.idle_seconds
        for name, part, whole in (
            ("forwards_per_token", self.num_forwards, self.num_tokens),
            ("tokens_per_second_per_rank", self.num_tokens, seconds),
            ("padding_share", self.num_hidden_pairs, self.num_pairs),
            ("replay_share", self.num_replays, self.num_forwards),
            ("cache_use", self.peak_pages, self.num_pages),
            ("idle_share", self.idle_seconds, seconds),
            *(
                (f"acceptance_at_{place}", committed, offered)
                for place, (committed, offered) in enumerate(
                    zip(self.committed_K.tolist(), self.offered_K.tolist(), strict=True)
                )
            ),
        ):
            if whole:
                metrics.add(f"rollout/{name}", part / whole, weight=whole)
        metrics.add_sum("rollout/preemptions", self.num_preemptions)
        if self.pipeline_bubble is not None:
            metrics.add("rollout/pipeline_bubble", self.pipeline_bubble)
        return metrics
