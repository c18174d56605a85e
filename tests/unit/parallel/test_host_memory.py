from __future__ import annotations

import pytest
import torch

from megatron_opdlm.parallel.host_memory import HostedWeights


def make_weights() -> list[torch.Tensor]:
    return [torch.arange(6.0).view(2, 3), torch.tensor([1.5, -2.5], dtype=torch.bfloat16), torch.tensor([7])]


def sizes(weights: list[torch.Tensor]) -> list[int]:
    return [weight.untyped_storage().nbytes() for weight in weights]


def test_weights_take_memory_only_while_they_are_on_the_device():
    weights = make_weights()
    hosted = HostedWeights(weights)
    assert sizes(weights) == [0, 0, 0] and hosted.num_bytes == 24 + 4 + 8
    for _ in range(2):
        with hosted.on_device():
            assert sizes(weights) == [24, 4, 8]
            for weight, expected in zip(weights, make_weights(), strict=True):
                assert weight.equal(expected)
        assert sizes(weights) == [0, 0, 0]


def test_tensors_that_share_memory_still_do():
    whole = torch.arange(4.0)
    hosted = HostedWeights([whole, whole[2:], torch.nn.Parameter(whole)])
    assert hosted.num_bytes == 16
    with hosted.on_device():
        whole[3] = 9.0
        assert whole[2:].tolist() == [2.0, 9.0]
    with hosted.on_device():
        assert whole.tolist() == [0.0, 1.0, 2.0, 3.0], "what was written there is not kept"


def test_memory_is_freed_after_a_failure():
    weights = make_weights()
    hosted = HostedWeights(weights)
    with pytest.raises(InterruptedError), hosted.on_device():
        raise InterruptedError
    assert sizes(weights) == [0, 0, 0]
