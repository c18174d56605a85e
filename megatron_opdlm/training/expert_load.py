"""How evenly a mixture's routers spread the student's tokens over the experts while it trains.

    load = ExpertLoad(student, groups)
    with load.counting(states.lengths_B, positions_T):
        hidden = model(streams, positions, states.lengths_B)
    load.take()                                            # 1.7: the busiest expert has 1.7 times the mean's tokens

Every token of both streams counts for each expert it goes to, padding does not. The busiest expert sets the pace of
its rank; and a router that comes to send everything to few experts has lost the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import Router

from megatron_opdlm.models.pipeline import PipelineModel


class ExpertLoad:
    """Tokens by layer and expert since the last `take`. In a dense model there is nothing to count."""

    def __init__(self, model: PipelineModel, groups: ProcessGroupCollection) -> None:
        self._groups = groups
        self._counts_by_router: dict[Router, torch.Tensor] = {}
        self._is_real: torch.Tensor | None = None
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        for router in self._routers:
            router.register_forward_hook(self._count)

    @contextmanager
    def counting(self, lengths_B: torch.Tensor, positions_T: torch.Tensor) -> Iterator[None]:
        """Counts the forwards within it: over these positions of the clean rows and of the noisy ones behind them.

        Backward passes, which may run a layer's forward again, belong outside.
        """
        is_real_TB = positions_T[:, None] < lengths_B.repeat(2)
        # Under tensor parallelism a mixture has sequence parallelism too: a rank routes its part of the positions.
        self._is_real = is_real_TB.chunk(self._groups.tp.size())[self._groups.tp.rank()].flatten()
        try:
            yield
        finally:
            self._is_real = None

    def _count(self, router: Router, _: tuple, routed: tuple[torch.Tensor, torch.Tensor]) -> None:
        if self._is_real is not None:
            counts_E = (routed[1] & self._is_real[:, None]).sum(0)
            self._counts_by_router[router] = self._counts_by_router.get(router, 0) + counts_E

    def take(self) -> float | None:
        """Tokens of the busiest expert over the mean of its layer's experts, in the layer where that is highest.

        None for a dense model. Adds up over all ranks, which must all call it.
        """
        if not self._routers:
            return None
        counts_LE = torch.stack([self._counts_by_router[router] for router in self._routers]).double()
        self._counts_by_router.clear()
        dist.all_reduce(counts_LE, group=self._groups.tp_dp_cp)
        highest = (counts_LE.amax(1) / counts_LE.mean(1)).max()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._groups.pp)
        return float(highest)
