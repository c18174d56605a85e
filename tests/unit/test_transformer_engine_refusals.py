"""What the backend `te` refuses, in which words, and what it builds: by GPU, number format, recipe and version."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_opdlm.models.attention.backend import AttentionCase, Streams
from megatron_opdlm.models.attention.transformer_engine import TransformerEngineAttention
from tests.fake_transformer_engine import FakeTransformerEngine

HOPPER = AttentionCase(device_type="cuda", compute_capability=(9, 0), dtype=torch.bfloat16, head_dim=128)
HOPPER_FP8 = dataclasses.replace(HOPPER, fp8=True, fp8_recipe="delayed")
BLACKWELL_FP8 = dataclasses.replace(HOPPER_FP8, compute_capability=(10, 0))


def build_layer(monkeypatch, case, **settings):
    FakeTransformerEngine().installed(monkeypatch)
    config = TransformerConfig(num_layers=1, hidden_size=256, num_attention_heads=2, kv_channels=128, **settings)
    return TransformerEngineAttention(case).for_layer(config, layer_number=1)


def test_a_layer_refuses_another_scale_than_its_modules(monkeypatch):
    layer = build_layer(monkeypatch, HOPPER)
    streams = Streams(*[torch.zeros(1, 16, 2, 128)] * 6)
    with pytest.raises(AssertionError, match="built for one scale"):
        layer.attend(streams, lengths=torch.tensor([16]), block_size=4, scale=1.0)


def test_core_attention_recompute_in_fp8_is_refused(monkeypatch):
    selective = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    with pytest.raises(
        ValueError, match=r"recompute_modules \(core_attn\) .* must not be combined with attention\.fp8"
    ):
        build_layer(monkeypatch, HOPPER_FP8, **selective)
    build_layer(monkeypatch, HOPPER, **selective)
    build_layer(monkeypatch, HOPPER_FP8, **{**selective, "recompute_modules": ["mlp"]})


def test_fused_attention_that_is_switched_off_is_refused(monkeypatch):
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    with pytest.raises(ValueError, match=r"NVTE_FUSED_ATTN \(0\) must be 1 or unset"):
        build_layer(monkeypatch, HOPPER)


@pytest.mark.parametrize(
    ("case", "changes", "sentence"),
    [
        (HOPPER, {"device_type": "cpu", "compute_capability": None}, "device (cpu) must be cuda"),
        (HOPPER, {"compute_capability": (7, 5)}, "compute capability (7.5) must be 8.0 or higher"),
        (HOPPER, {"kernel": "fa3"}, "attention.kernel (fa3) must be auto"),
        (HOPPER, {"dtype": torch.float32}, "precision.dtype (float32) must be bfloat16"),
        (HOPPER, {"head_dim": 100}, "head_dim (100) must be a multiple of 8 and at most 256"),
        (
            HOPPER,
            {"compute_capability": (8, 0), "head_dim": 256},
            "head_dim (256) must be a multiple of 8 and at most 128",
        ),
        (HOPPER_FP8, {"compute_capability": (8, 9)}, "compute capability (8.9) must be 9.0 or 10.x for attention.fp8"),
        (
            HOPPER_FP8,
            {"compute_capability": (12, 0)},
            "compute capability (12.0) must be 9.0 or 10.x for attention.fp8",
        ),
        (HOPPER_FP8, {"fp8_recipe": "off"}, "precision.fp8 (off) must be delayed or tensorwise"),
        (HOPPER_FP8, {"fp8_recipe": "blockwise"}, "precision.fp8 (blockwise) must be delayed or tensorwise"),
        (HOPPER_FP8, {"fp8_recipe": "tensorwise"}, "precision.fp8 (tensorwise) must be delayed for attention.fp8"),
        (HOPPER_FP8, {"head_dim": 64}, "head_dim (64) must be 128 for attention.fp8 on compute capability 9.0"),
        (BLACKWELL_FP8, {"head_dim": 72}, "head_dim (72) must be a multiple of 16 and at most 128"),
    ],
)
def test_what_fused_attention_cannot_serve_is_refused(monkeypatch, case, changes, sentence):
    FakeTransformerEngine().installed(monkeypatch)
    assert TransformerEngineAttention.refusal(dataclasses.replace(case, **changes)).startswith(sentence)


@pytest.mark.parametrize(
    "case",
    [
        HOPPER,
        HOPPER_FP8,
        dataclasses.replace(HOPPER, compute_capability=(8, 0), head_dim=64),
        dataclasses.replace(BLACKWELL_FP8, fp8_recipe="tensorwise", head_dim=64),
    ],
)
def test_what_fused_attention_serves_is_built(monkeypatch, case):
    FakeTransformerEngine().installed(monkeypatch)
    assert TransformerEngineAttention.refusal(case) is None
    TransformerEngineAttention(case)


def test_hopper_takes_tensorwise_linear_layers_with_delayed_scaling_in_attention(monkeypatch):
    FakeTransformerEngine().installed(monkeypatch)
    case = dataclasses.replace(HOPPER_FP8, fp8_recipe="tensorwise")
    monkeypatch.setenv("NVTE_DPA_FP8_RECIPE", "DelayedScaling")
    assert TransformerEngineAttention.refusal(case) is None
    monkeypatch.setenv("NVTE_DPA_FP8_RECIPE", "F16")
    assert TransformerEngineAttention.refusal(case).startswith(
        "NVTE_DPA_FP8_RECIPE (F16) must be one of DelayedScaling"
    )


def test_a_missing_package_is_refused_with_how_to_get_it(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "pip install --no-build-isolation" in TransformerEngineAttention.refusal(HOPPER)


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [("2.8.0", True), ("2.9.0", False), ("2.14.1+c21f3a", False), ("2.20.2", False), ("2.21.0.dev0", True)],
)
def test_versions_outside_the_checked_range_are_refused(monkeypatch, version, is_refused):
    fake = FakeTransformerEngine().installed(monkeypatch)
    fake.version = version
    reason = TransformerEngineAttention.refusal(HOPPER)
    assert (reason is not None) == is_refused
    assert not is_refused or reason.startswith(f"transformer-engine ({version}) must be a version from 2.9 to 2.20")


@pytest.mark.parametrize(
    ("case", "cudnn_version", "is_refused"),
    [
        (HOPPER, (8, 9, 7), True),
        (HOPPER, (9, 6, 0), False),
        (HOPPER, (9, 10, 1), True),
        (HOPPER_FP8, (9, 6, 0), True),
        (HOPPER_FP8, (9, 7, 0), False),
        (HOPPER_FP8, (9, 10, 0), True),
        (BLACKWELL_FP8, (9, 7, 0), False),
        (dataclasses.replace(BLACKWELL_FP8, fp8_recipe="tensorwise"), (9, 13, 0), True),
        (dataclasses.replace(BLACKWELL_FP8, fp8_recipe="tensorwise"), (9, 14, 0), False),
        (dataclasses.replace(HOPPER, compute_capability=(10, 0)), (9, 6, 0), True),
    ],
)
def test_cudnn_versions_that_cannot_serve_the_case_are_refused(monkeypatch, case, cudnn_version, is_refused):
    fake = FakeTransformerEngine().installed(monkeypatch)
    fake.cudnn_version = cudnn_version
    if not is_refused:
        TransformerEngineAttention(case)
        return
    with pytest.raises(
        ValueError, match=rf"cuDNN \({cudnn_version[0]}\.{cudnn_version[1]}\.{cudnn_version[2]}\) must be"
    ):
        TransformerEngineAttention(case)
