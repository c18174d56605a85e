"""Our Adam against PyTorch's AdamW and Adam, and the contract that Megatron's optimizer needs."""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.parallel.adam import Adam


def run(optimizer_class, weight_decay: float, steps: int = 5, **kwargs) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(2)]
    optimizer = optimizer_class(params, lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=weight_decay, **kwargs)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(3, 4, generator=generator)
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_decoupled_decay_matches_adamw(weight_decay):
    for ours, theirs in zip(run(Adam, weight_decay), run(torch.optim.AdamW, weight_decay), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_coupled_decay_matches_adam():
    for ours, theirs in zip(run(Adam, 0.1, adam_w_mode=False), run(torch.optim.Adam, 0.1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_step_is_in_the_group_and_the_state_is_exactly_the_two_moments():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = Adam([param], lr=1e-2)
    param.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"}


def test_a_parameter_without_a_gradient_is_left_alone():
    still, moved = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Adam([still, moved], lr=1e-2)
    moved.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(2))
    assert not torch.equal(moved.detach(), torch.ones(2))
