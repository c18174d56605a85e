"""The attention benchmark counts the pattern's work exactly and measures what it says it measures."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch

from megatron_opdlm.diffusion.attention_pattern import block_diffusion_mask
from tools.benchmark_attention import (
    Sizes,
    attention_of,
    counted_bytes,
    counted_flops,
    errors,
    floor_ms,
    make_inputs,
    measure,
    write,
)

TOY = Sizes(block_size=4, batch=2, heads=4, kv_heads=2, head_dim=8)
CPU = torch.device("cpu")


def arguments(**changes):
    return Namespace(**({"threads": 1, "dtype": None, "repeats": 2, "check_up_to": 64} | changes))


@pytest.mark.parametrize(("length", "block_size"), [(12, 4), (10, 5), (9, 1)])
def test_counted_flops_are_those_of_the_masks_pairs(length, block_size):
    sizes = Sizes(block_size=block_size, batch=3, heads=6, kv_heads=2, head_dim=16)
    pairs = int(block_diffusion_mask(torch.tensor([length]), length, block_size).sum())
    # A score and its share of the output take 2D operations each; the backward has five such products, not two.
    assert counted_flops(length, sizes) == 3 * 6 * pairs * (4 * 16) * (1 + 5 / 2)


def test_counted_bytes_are_those_of_the_tensors():
    streams, grads = make_inputs(10, TOY, torch.bfloat16, CPU)
    inputs, outputs = (sum(x.nbytes for x in tensors) for tensors in (streams, grads))
    forward, backward = inputs + outputs, (inputs + 2 * outputs) + inputs
    assert counted_bytes(10, TOY) == forward + backward


@pytest.mark.parametrize("name", ["aten", "sdpa", "dense"])
def test_an_exact_backend_has_rounding_errors_only(name):
    line = measure(name, 16, TOY, arguments())
    assert 0 < line["out_error"] < 1e-6 and 0 < line["grad_error"] < 2e-6
    assert line["forward_ms"] > 0 and line["backward_ms"] > 0 and len(line["seconds"]) == 2
    assert (line["backend"], line["seq"], line["device"], line["floor_ms"]) == (name, 16, "cpu", None)


def test_an_attention_of_another_pattern_shows_in_the_errors():
    streams, grads = make_inputs(16, TOY, torch.float32, CPU)
    other = attention_of("aten", Sizes(block_size=3, batch=2, heads=4, kv_heads=2, head_dim=8), torch.float32, CPU)
    wrong = errors(other, streams, grads, TOY)
    assert wrong["out_error"] > 0.1 and wrong["grad_error"] > 0.1


def test_plain_causal_attention_and_long_sequences_have_no_error():
    assert "out_error" not in measure("causal", 16, TOY, arguments())
    assert "out_error" not in measure("aten", 16, TOY, arguments(check_up_to=12))


def test_floor_is_the_longer_of_work_and_traffic_at_the_peaks(monkeypatch):
    monkeypatch.setattr("tools.benchmark_attention.device_name", lambda device: "NVIDIA H100 80GB HBM3")
    long, short = Sizes(heads=32, kv_heads=8), Sizes(heads=32, kv_heads=8, block_size=1)
    assert floor_ms(8192, long, CPU) == pytest.approx(counted_flops(8192, long) / 989e12 * 1e3, abs=1e-4)
    assert floor_ms(64, short, CPU) == pytest.approx(counted_bytes(64, short) / 3.35e12 * 1e3, abs=1e-4)


def test_lines_and_plot_are_kept(tmp_path):
    lines = [measure(name, length, TOY, arguments()) for name in ("aten", "sdpa") for length in (8, 16)]
    lines = [line | {"seconds": 0.5, "step_mib": 2.0} for line in lines]
    write([*lines, {"ratio": "sdpa to aten", "speedup": 1.0}], tmp_path / "out")
    kept = [json.loads(line) for line in (tmp_path / "out" / "attention.jsonl").read_text().splitlines()]
    assert kept[:-1] == lines and kept[-1]["ratio"] == "sdpa to aten"
    assert (tmp_path / "out" / "attention.png").read_bytes().startswith(b"\x89PNG")
