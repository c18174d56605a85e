"""The two variants of the train-step benchmark compute the same thing, so that their times can be compared.

The naive variant shares only the drawn state with ours: Hugging Face's model, masks of its own, autograd.
"""

from __future__ import annotations

import pytest

from megatron_opdlm.observability.measurement import summarise
from tools.benchmark_train_step import Sizes, compare, measure

# Blocks of 4: the first response block holds two prompt tokens, and the 10 to 14 trained positions make several chunks.
TOY = Sizes(prompt_length=6, response_length=18, vocab_size=100, hidden_size=32, num_layers=2, chunk_size=4)


@pytest.fixture
def world():
    """Leaves the one-process world that ours joins."""
    yield
    from megatron_opdlm.parallel.initialize import shut_down

    shut_down()


def test_both_variants_compute_the_same_loss_and_gradient(world):
    ours, naive = (measure(variant, TOY, repeats=1) for variant in ("ours", "naive"))
    assert ours["trained_positions"] == naive["trained_positions"] >= 2 * TOY.chunk_size
    assert ours["loss"] == pytest.approx(naive["loss"], rel=1e-4)
    assert ours["grad_norm"] == pytest.approx(naive["grad_norm"], rel=1e-4)
    assert naive["loss"] > 0.1, "student and teacher differ, so the comparison can fail"


def test_ratio_takes_median_time_and_largest_memory():
    ours, naive = (
        summarise([run(seconds, 1.0), run([9.0 * seconds[1]], 2.0 * seconds[0])]) for seconds in ([2, 1], [8, 3])
    )
    assert (ours["seconds"], ours["fastest_seconds"], ours["step_mib"]) == (2, 1, 4.0)
    assert (naive["seconds"], naive["fastest_seconds"], naive["step_mib"]) == (8, 3, 16.0)
    ratio = compare(ours, naive)
    assert (ratio["speedup"], ratio["speedup_of_fastest"], ratio["step_memory_share"]) == (4.0, 3.0, 0.25)


def run(seconds, step_mib):
    """What one process reports, in part."""
    return {"seconds": seconds, "step_mib": step_mib, "peak_mib": 100.0 + step_mib}
