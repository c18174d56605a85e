"""The load of the busiest expert by hand: routers stand alone, their routes are written down."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist


class Model:
    """A model of routers, as `ExpertLoad` sees it."""

    def __init__(self, routers: list[torch.nn.Module]) -> None:
        self.routers = routers

    def modules(self) -> list[torch.nn.Module]:
        return self.routers


@pytest.fixture
def build(world_of_one):
    """A function that makes `ExpertLoad` and routers that choose what they are told to."""
    from megatron_opdlm.training import expert_load  # imports Megatron behind the CPU seam

    class Scripted(expert_load.Router):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def routing(self, logits: torch.Tensor) -> None:
            """Asked for by the base class, never called."""

        def forward(self, experts_of_tokens: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = torch.zeros(len(experts_of_tokens), 4, dtype=torch.bool)
            for token, experts in enumerate(experts_of_tokens):
                chosen[token, experts] = True
            return chosen.float(), chosen

    def build(num_routers: int):
        world = dist.group.WORLD
        routers = [Scripted() for _ in range(num_routers)]
        return expert_load.ExpertLoad(Model(routers), SimpleNamespace(tp=world, tp_dp_cp=world, pp=world)), routers

    return build


def test_the_busiest_expert_of_the_most_uneven_layer_counts(build):
    load, (even, uneven) = build(2)
    with load.counting(torch.tensor([2]), torch.arange(2)):  # one row of two positions, clean and noisy: four tokens
        even([[0, 1], [2, 3], [0, 2], [1, 3]])
        uneven([[0, 1], [0, 2], [0, 3], [0, 1]])
    assert load.take() == pytest.approx(4 / (8 / 4))


def test_padding_and_what_runs_outside_are_not_counted(build):
    load, (router,) = build(1)
    with load.counting(torch.tensor([1]), torch.arange(2)):  # position 1 is padding in both streams
        router([[0, 1], [0, 2], [2, 3], [2, 3]])
    router([[0, 1]] * 4)
    assert load.take() == pytest.approx(2 / (4 / 4)), "expert 0 has both tokens that are real"


def test_taking_begins_anew(build):
    load, (router,) = build(1)
    for experts, expected in (([0, 1], 2.0), ([2, 3], 2.0)):
        with load.counting(torch.tensor([1]), torch.arange(1)):
            router([experts, experts])
        assert load.take() == pytest.approx(expected)
    with load.counting(torch.tensor([1]), torch.arange(1)):
        router([[0, 1], [2, 3]])
    assert load.take() == pytest.approx(1.0), "counts of before would leave it above"


def test_a_dense_model_has_no_load(build):
    load, _ = build(0)
    assert load.take() is None
