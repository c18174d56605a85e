"""The two variants of the divergence benchmark compute the same thing, and memory is counted as it says."""

from __future__ import annotations

from typing import get_args

import pytest

from megatron_opdlm.config.method import DivergenceKind
from tools.benchmark_divergence import Sizes, compare, measure

TOY = Sizes(positions=24, vocab_size=50, hidden_size=8, chunk_size=7)


@pytest.mark.parametrize("kind", get_args(DivergenceKind))
def test_both_variants_compute_the_same_loss_and_gradients(kind):
    ours, plain = (measure(variant, kind, TOY) for variant in ("ours", "plain"))
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert ours["gradient_norms"] == pytest.approx(plain["gradient_norms"], rel=1e-4)
    assert plain["loss"] > 0.1, "student and teacher differ, so the comparison can fail"


def test_the_gradients_are_counted_apart():
    line = measure("ours", "forward_kl", TOY)
    gradients = line["weight_gradient_mib"] + line["hidden_gradient_mib"]
    assert line["with_gradients_mib"] == pytest.approx(line["extra_mib"] + gradients, abs=0.2)
    big = Sizes(positions=3, vocab_size=2**12, hidden_size=2**7)
    assert measure("ours", "forward_kl", big)["weight_gradient_mib"] == 4 * 2**19 / 2**20


def test_ratios_are_of_plain_over_ours_in_time_and_of_ours_over_plain_in_memory():
    ours = {"seconds": 2.0, "extra_mib": 10.0, "with_gradients_mib": 20.0}
    plain = {"seconds": 6.0, "extra_mib": 100.0, "with_gradients_mib": 40.0}
    ratio = compare(ours, plain)
    assert (ratio["speedup"], ratio["extra_memory_share"], ratio["with_gradients_share"]) == (3.0, 0.1, 0.5)


def test_the_estimate_of_plain_is_five_tensors_of_all_logits():
    assert Sizes().plain_gib == pytest.approx(5 * 4096 * 151936 * 4 / 2**30)
