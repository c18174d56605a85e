"""`training.deterministic` reaches every library that would leave an order open."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import ParallelConfig
from megatron_opdlm.parallel.determinism import ENVIRONMENT, make_deterministic


@pytest.fixture
def deterministic(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)


def test_the_switches_are_set_but_for_those_that_somebody_has_set(deterministic):
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    assert os.environ["NCCL_ALGO"] == "Ring"
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def test_megatron_is_told(deterministic):
    assert tiny_transformer_config().deterministic_mode


def test_megatron_is_not_told_otherwise():
    assert not tiny_transformer_config().deterministic_mode


def test_the_choice_is_not_made_a_second_time():
    with pytest.raises(
        ValueError, match=r"student\.transformer\.deterministic_mode .* training\.deterministic chooses"
    ):
        load_config(["--student.transformer", '{"deterministic_mode": true}'])


def tiny_transformer_config():
    from megatron_opdlm.models.build import transformer_config
    from tests.unit.training.test_step_metrics import ARCHITECTURE

    return transformer_config(ARCHITECTURE, parallel=ParallelConfig(), dtype="float32", overrides={})
