"""Logits that decoding saw, with its cache of keys and values, against reading the whole sequence anew in every state.

The oracle is `transformers` in float64 under the block-causal mask: for every prompt, block and step one sequence that
ends with the block, its uncommitted positions masked.
"""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.config.schema import ParallelConfig, RolloutConfig
from megatron_opdlm.diffusion.trajectory import Trajectory
from tests.fake_flash_attn import install_flash
from tests.parity.test_on_policy_invariant import Key, record_rollout
from tests.references import load_reference, masked_logits
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, load_student, tiny_config

SIZES = [(1, 1), (4, 4), (4, 3), (4, 1), (8, 8), (8, 3), (16, 16), (16, 5)]
"""Block size and denoising steps per block."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("hf"), seed=3)


def states_of(trajectory: Trajectory, mask_token_id: int) -> list[tuple[list[int], list[Key]]]:
    """Each state that was decoded in: its ids up to the end of the block, and the places that were masked."""
    length, size = trajectory.prompt_length, trajectory.block_size
    steps = [0] * length + trajectory.step_map_R.tolist()
    ids, states = trajectory.terminal_ids_T.tolist(), []
    for begin in range(length // size * size, len(ids), size):
        block = range(begin, begin + size)
        for step in range(1, max(steps[position] for position in block) + 1):
            masked = [position for position in block if steps[position] >= step]
            state = [mask_token_id if position in masked else ids[position] for position in range(begin + size)]
            states.append((state, [(trajectory.prompt_id, position, step) for position in masked]))
    return states


@torch.no_grad()
def recomputed(folder, states: list[tuple[list[int], list[Key]]], block_size: int) -> dict[Key, torch.Tensor]:
    """Logits at the masked places, from whole sequences. What fills up a short one lies in later blocks."""
    length = max(len(ids) for ids, _ in states)
    ids_BT = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in states])
    block_T = torch.arange(length) // block_size
    is_visible = (block_T[:, None] >= block_T).expand(len(states), -1, -1)
    logits_BTV = masked_logits(load_reference(folder), ids_BT, torch.arange(length), is_visible)
    return {key: logits_TV[key[1]] for logits_TV, (_, keys) in zip(logits_BTV, states, strict=True) for key in keys}


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
@pytest.mark.parametrize(("block_size", "num_steps"), SIZES)
def test_cached_decoding_matches_full_recompute_for_every_remainder_of_a_prompt(
    folder, world_of_one, monkeypatch, block_size, num_steps, attention
):
    if attention == "flash":
        install_flash(monkeypatch, "flash-attn 3", page_size=8)
    rollout = RolloutConfig(
        attention=attention,
        block_size=block_size,
        denoising_steps_per_block=num_steps,
        dynamic_threshold=0.12,
        max_new_tokens=block_size + 2,
    )
    with layout(ParallelConfig()) as groups:
        model, special = load_student(tiny_config(folder, rollout=rollout), groups)
        trajectories, seen = record_rollout(monkeypatch, model, special, rollout)
    assert {t.prompt_length % block_size for t in trajectories} == set(range(block_size))
    states = [state for t in trajectories for state in states_of(t, special.mask_token_id)]
    expected = recomputed(folder, states, block_size)
    assert expected.keys() == seen.keys()
    for key, logits_V in seen.items():
        is_live = logits_V.isfinite()
        assert is_live.sum() == special.vocab_size - 1, "all tokens but the mask token take part"
        assert (logits_V - expected[key][: special.vocab_size])[is_live].abs().max() <= 1e-5
