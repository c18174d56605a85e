"""Forwards of a rollout that the GPU runs as one CUDA graph, without waiting for Python to launch every kernel.

A denoising step reads a few hundred tokens through all layers: the GPU is done with a kernel before the next one has
been launched. A graph holds the kernels of one whole forward and starts at once. It always reads the same memory and
has the same number of tokens. So a forward is filled up to the next of a few sizes by blocks of nobody's, which read
and write page 0 alone; its tokens are copied to where the graph of that size looks for them, and the graph is replayed.

    graphs = ForwardGraphs(model, cache, block_size=4, most_blocks=64, capture=CudaCapture())
    hidden_TH = graphs.forward(tokens)                  # valid until the next forward

A size that comes up for the first time runs as it is, which warms up what a kernel prepares at its first call; at the
second time it is captured. Graphs end with the rollout, for the pages that they read are given back for training. What
that costs: for each size one forward's Python and a wait for the GPU, and memory for the activations of the largest
forward, which all graphs share because they never run at the same time. The weights are trained where they are, so a
graph never holds old ones.

Graphs have not been run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.device import to_device
from megatron_opdlm.rollout.forward import cached_forward
from megatron_opdlm.rollout.kv_cache import KeyValueCache, PagedAttention, PlacedTokens, QueryTokens

Forward = Callable[[], torch.Tensor]
Replay = Callable[[], None]
Capture = Callable[[Forward], tuple[Replay, torch.Tensor]]
"""Records what a forward launches: how to run that again, and the tensor that it fills each time."""


def graphs_refusal(model: PipelineModel, attention: PagedAttention, device: torch.device) -> str | None:
    """Why forwards cannot be replayed, as a clause; None if they can."""
    if device.type != "cuda":
        return f"it needs a GPU, the model is on {device.type}"
    if not attention.is_capturable:
        return f"{type(attention).__name__} here has shapes that depend on the tokens, or waits for the GPU"
    if model.link.num_stages > 1:
        return f"parallel.pipeline_model_parallel_size ({model.link.num_stages}) must be 1"
    if model.config.num_moe_experts:
        return "how many tokens an expert gets is known to the GPU alone"
    return None


class CudaCapture:
    """Captures CUDA graphs that share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Forward) -> tuple[Replay, torch.Tensor]:
        """See `Capture`. Waits for the GPU."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: a checkpoint that is still being written may use the GPU from its own thread
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_TH = forward()
        return graph.replay, hidden_TH


@dataclass(frozen=True)
class _Captured:
    """The graph of one size."""

    placed: PlacedTokens
    """Where it looks for its tokens."""
    replay: Replay
    hidden_TH: torch.Tensor


class ForwardGraphs:
    """The graphs of one rollout, whose cache must be attached. For a model of one stage and one chunk.

    All ranks of a tensor-parallel group must call it with the same tokens.
    """

    def __init__(
        self, model: PipelineModel, cache: KeyValueCache, block_size: int, most_blocks: int, capture: Capture
    ) -> None:
        self._model, self._cache, self._block_size, self._most_blocks = model, cache, block_size, most_blocks
        self._capture = capture
        self._graphs: dict[int, _Captured | None] = {}
        """Blocks -> graph; None after the first forward of that size."""
        self.num_replays = 0

    def takes(self, tokens: QueryTokens) -> bool:
        """Whether a forward is small enough to be filled up and replayed."""
        return len(tokens.ids_T) <= self._most_blocks * self._block_size

    def forward(self, tokens: QueryTokens) -> torch.Tensor:
        """Hidden states `[N, H]`, as `cached_forward` returns them; the next forward may overwrite them.

        How many outputs are read is not in the shapes of a graph, so every token goes through the whole last layer.
        """
        hidden_TH = self._hidden_of_all(tokens)
        return hidden_TH if tokens.read_N is None else hidden_TH[to_device(tokens.read_N, hidden_TH.device)]

    def _hidden_of_all(self, tokens: QueryTokens) -> torch.Tensor:
        num_tokens = len(tokens.ids_T)
        num_blocks = filled_up(num_tokens // self._block_size)
        placed = self._cache.place(with_empty_blocks(tokens, num_blocks, self._block_size))
        if num_blocks not in self._graphs:
            self._graphs[num_blocks] = None
            return self._run(placed)[:num_tokens]
        if self._graphs[num_blocks] is None:
            self._graphs[num_blocks] = self._captured(placed)
        graph = self._graphs[num_blocks]
        for place, tensor in zip(_tensors(graph.placed), _tensors(placed), strict=True):
            place.copy_(tensor)
        graph.replay()
        self.num_replays += 1
        return graph.hidden_TH[:num_tokens]

    def _captured(self, placed: PlacedTokens) -> _Captured:
        ids_T, positions_T, addresses_T, *layout = (tensor.clone() for tensor in _tensors(placed))
        own = PlacedTokens(ids_T, positions_T, addresses_T, type(placed.layout)(*layout))
        return _Captured(own, *self._capture(lambda: self._run(own)))

    def _run(self, placed: PlacedTokens) -> torch.Tensor:
        """The forward of a model that has no other stage to wait for."""
        work = cached_forward(self._model, self._cache, placed)
        try:
            next(work)
        except StopIteration as end:
            return end.value
        raise AssertionError("a model of one chunk yields to nobody")


def filled_up(num_blocks: int) -> int:
    """The size of the graph for so many blocks: there are four to a power of two, so that at most a fifth is nobody's.

    >>> [filled_up(num) for num in (1, 7, 8, 9, 16, 17, 33, 129)]
    [1, 7, 8, 10, 16, 20, 40, 160]
    """
    step = 1 << max(0, (num_blocks - 1).bit_length() - 3)
    return -(-num_blocks // step) * step


def with_empty_blocks(tokens: QueryTokens, num_blocks: int, block_size: int) -> QueryTokens:
    """The list with as many blocks, all of them read, the added ones in page 0, which belongs to nobody."""
    num_tokens = num_blocks * block_size
    num_added = num_blocks - len(tokens.ids_T) // block_size
    assert len(tokens.ids_T) % block_size == 0, "a forward reads whole blocks"
    return QueryTokens(
        ids_T=F.pad(tokens.ids_T, (0, num_tokens - len(tokens.ids_T))),
        first_A=F.pad(tokens.first_A, (0, num_added)),
        counts_A=F.pad(tokens.counts_A, (0, num_added), value=block_size),
        page_table_AP=F.pad(tokens.page_table_AP, (0, 0, 0, num_added)),
    )


def _tensors(placed: PlacedTokens) -> Iterator[torch.Tensor]:
    yield from (placed.ids_T, placed.positions_T, placed.addresses_T)
    yield from placed.layout
