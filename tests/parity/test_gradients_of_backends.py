"""Whole training steps with every attention backend: activation recompute and the split of heads change nothing.

Backends for GPUs run on exact fakes of their packages. The oracle of a step is the same step with the dense backend and
without recompute, which `test_gradients` holds against `transformers` in float64.
"""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.checkpointing import student_and_teacher
from megatron_opdlm.config.schema import ParallelConfig
from megatron_opdlm.models.attention.aten import AtenAttention
from megatron_opdlm.models.attention.backend import AttentionCase, Streams
from megatron_opdlm.models.attention.dense import DenseAttention
from megatron_opdlm.models.attention.flash import FlashAttention
from megatron_opdlm.models.attention.transformer_engine import TransformerEngineAttention
from tests.fake_transformer_engine import FakeTransformerEngine
from tests.parity import test_flash_package, test_gradients
from tests.parity.test_attention import CPU, make_inputs
from tests.parity.test_attention_transformer_engine import HOPPER, transformer_config
from tests.parity.test_flash_package import PACKAGES
from tests.parity.test_gradients import make_trainer, megatron_gradients, roll_out_states
from tests.worlds import layout

folders, install = test_gradients.folders, test_flash_package.install  # fixtures
BACKENDS = ("dense", "aten", "te", *(name for name in PACKAGES))


@pytest.fixture
def build(monkeypatch, install):
    """Builds a backend by its name here, or by that of the package whose fake it runs on."""

    def build_one(name):
        if name in ("dense", "aten"):
            return {"dense": DenseAttention, "aten": AtenAttention}[name](CPU)
        if name == "te":
            FakeTransformerEngine().installed(monkeypatch)
            return TransformerEngineAttention(HOPPER)
        module_name, functions, changes = PACKAGES[name]
        install(module_name, functions())
        settings = {"device_type": "cuda", "compute_capability": (9, 0), "dtype": torch.bfloat16} | changes
        return FlashAttention(AttentionCase(**settings))

    return build_one


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_has_the_gradients_of_the_dense_backend_without_recompute(
    name,
    recompute,
    build,
    monkeypatch,
    folders,
    world_of_one,
    tmp_path,
):
    with layout(ParallelConfig()):
        dense = make_trainer(folders, tmp_path / "dense", {"micro_batch_size": 2})
        states = roll_out_states(dense)
        expected, _ = megatron_gradients(dense, states)
        backend = build(name)
        attended = []
        monkeypatch.setattr(student_and_teacher, "build_backend", lambda *_: attended.append(name) or backend)
        case = {"micro_batch_size": 2, "recompute": recompute}
        actual, _ = megatron_gradients(make_trainer(folders, tmp_path / "other", case), states)
    assert attended == [name]
    for key, gradient in expected.items():
        assert (actual[key] - gradient).norm() <= 1e-5 * gradient.norm(), key


@pytest.mark.parametrize("name", BACKENDS)
def test_each_half_of_the_heads_attends_as_it_does_among_all(name, build):
    backend, lengths = build(name), [13, 9]
    streams, _ = make_inputs(lengths, 13, 8, 4, 8)
    halves = [Streams(*(x.chunk(2, dim=2)[rank] for x in streams)) for rank in range(2)]
    whole, *parts = (
        backend.for_layer(transformer_config((x.query_clean.shape[2], x.key_clean.shape[2])), layer_number=1).attend(
            x, lengths=torch.tensor(lengths), block_size=4, scale=8**-0.5
        )
        for x in (streams, *halves)
    )
    for stream in range(2):
        joined = torch.cat([part[stream] for part in parts], dim=2)
        torch.testing.assert_close(joined, whole[stream], rtol=0, atol=1e-12)
