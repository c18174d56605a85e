"""The student's logits at a state in the training forward are those that the rollout saw in that state.

The rollout is recorded where it draws: which row, block and step a logit vector belongs to. Its trajectories then give
the states back, as the step map says, and one training forward per step number must reproduce every recorded vector.
"""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.config.schema import ParallelConfig, RolloutConfig, StatesConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.state_selections import rows_per_trajectory
from megatron_opdlm.diffusion.states import select_states
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import gathered_logits, layout, load_student, tiny_config

SEED = 4
SETTINGS = [
    {"remasking_strategy": "low_confidence_static"},
    {"dynamic_threshold": 0.12},
    {"dynamic_threshold": 0.12, "block_size": 8, "denoising_steps_per_block": 3},
    {"dynamic_threshold": 0.12, "block_size": 1, "denoising_steps_per_block": 1},
    {"dynamic_threshold": 0.12, "logit_shift": "next_token"},
    {"dynamic_threshold": 0.12, "logit_shift": "next_token", "block_size": 8, "denoising_steps_per_block": 3},
    {"dynamic_threshold": 0.12, "logit_shift": "next_token", "block_size": 1, "denoising_steps_per_block": 1},
]
Key = tuple[int, int, int]
"""Row, position, 1-based step within the block."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("hf"), seed=3)


def prompts_of_every_remainder(block_size: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(6)
    lengths = [*range(1, 2 * block_size + 1)]
    ids = [torch.randint(0, 44, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(prompt_id=row, token_ids=tuple(prompt)) for row, prompt in enumerate(ids)]


def record_rollout(monkeypatch, model, special, settings: RolloutConfig):
    """Trajectories, and the logits the rollout saw by row, position and step."""
    from megatron_opdlm.rollout import block_decoder
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    prompts = prompts_of_every_remainder(settings.block_size)
    seen: dict[Key, torch.Tensor] = {}
    places: list[Key] = []
    draw, draw_tokens = block_decoder.BlockDecoder._draw, block_decoder.draw_tokens

    def noting_draw(decoder, hidden_MH, slots_D, is_masked_DK):
        for slot, is_masked_K in zip(slots_D.tolist(), is_masked_DK, strict=True):
            start, step = int(decoder.slots.block_start_B[slot]), int(decoder.slots.step_B[slot]) + 1
            prompt_id = decoder.slots.requests[slot].prompt_id
            places.extend((prompt_id, start + offset, step) for offset in is_masked_K.nonzero()[:, 0].tolist())
        return draw(decoder, hidden_MH, slots_D, is_masked_DK)

    def noting_draw_tokens(logits_MV, *arguments, **settings):
        draws = draw_tokens(logits_MV, *arguments, **settings)  # hides the mask token and the padding first
        seen.update(zip(places[: len(logits_MV)], logits_MV[:, : special.vocab_size].clone(), strict=True))
        del places[: len(logits_MV)]
        return draws

    monkeypatch.setattr(block_decoder.BlockDecoder, "_draw", noting_draw)
    monkeypatch.setattr(block_decoder, "draw_tokens", noting_draw_tokens)
    engine = RolloutEngine(model, settings, special, SEED)
    return engine.generate([RolloutTask(prompt, settings.max_new_tokens) for prompt in prompts], step=0), seen


@torch.no_grad()
def training_logits(
    model, clean_BT: torch.Tensor, noisy_BT: torch.Tensor, lengths_B: torch.Tensor, rollout: RolloutConfig
) -> torch.Tensor:
    """Logits `[B, T, V]` for each position in the forward that training uses."""
    hidden = model(torch.cat([clean_BT, noisy_BT]), torch.arange(clean_BT.shape[1]), lengths_B)
    clean_BTV, noisy_BTV = gathered_logits(model, hidden).chunk(2)
    if rollout.logit_shift == "none":
        return noisy_BTV
    shifted_BTV = torch.full_like(noisy_BTV, torch.nan)
    for position in range(1, clean_BT.shape[1]):
        stream = clean_BTV if position % rollout.block_size == 0 else noisy_BTV
        shifted_BTV[:, position] = stream[:, position - 1]
    return shifted_BTV


def assert_equal_logits(actual: torch.Tensor, recorded: torch.Tensor, special) -> None:
    actual = actual[: special.vocab_size].clone()
    actual[special.mask_token_id] = -torch.inf
    is_live = recorded.isfinite()
    assert (actual - recorded)[is_live].abs().max() <= 1e-4
    assert actual.argmax() == recorded.argmax()


@pytest.mark.parametrize("backend", ["dense", "aten"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_training_logits_equal_what_the_rollout_saw_in_every_step(folder, world_of_one, monkeypatch, settings, backend):
    rollout = RolloutConfig(max_new_tokens=3 * settings.get("block_size", 4), stop_token_ids=[5], **settings)
    with layout(ParallelConfig()) as groups:
        model, special = load_student(tiny_config(folder, backend=backend, rollout=rollout), groups)
        trajectories, seen = record_rollout(monkeypatch, model, special, rollout)
        lengths_B = torch.tensor([len(t.terminal_ids_T) for t in trajectories])
        pad = torch.nn.utils.rnn.pad_sequence
        clean_BT = pad([t.terminal_ids_T for t in trajectories], batch_first=True)
        # the step of a prompt token is 0, so it is visible in every state
        steps_BT = pad(
            [torch.cat([t.step_map_R.new_zeros(t.prompt_length), t.step_map_R]) for t in trajectories], batch_first=True
        )
        num_compared = 0
        for step in range(1, rollout.denoising_steps_per_block + 1):
            noisy_BT = clean_BT.masked_fill(steps_BT >= step, special.mask_token_id)
            logits_BTV = training_logits(model, clean_BT, noisy_BT, lengths_B, rollout)
            for (row, position, seen_in), recorded in seen.items():
                if seen_in == step:
                    assert steps_BT[row, position] >= step, "a token is committed once"
                    assert_equal_logits(logits_BTV[row, position], recorded, special)
                    num_compared += 1
    assert num_compared == len(seen) == int(steps_BT.sum()), "a token of step s was masked in s steps"


SELECTIONS = {
    "one per block": {},
    "all steps": {"selection": "all_steps"},
    "every second step": {"selection": "all_steps", "shrink": 2},
}


@pytest.mark.parametrize("logit_shift", ["none", "next_token"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_selected_states_are_among_those_and_their_log_probabilities_agree(
    folder, world_of_one, monkeypatch, selection, logit_shift
):
    rollout = RolloutConfig(max_new_tokens=12, stop_token_ids=[5], dynamic_threshold=0.12, logit_shift=logit_shift)
    settings = StatesConfig(**SELECTIONS[selection])
    num_rows = rows_per_trajectory(settings, rollout.denoising_steps_per_block)
    with layout(ParallelConfig()) as groups:
        model, special = load_student(tiny_config(folder, rollout=rollout), groups)
        trajectories, seen = record_rollout(monkeypatch, model, special, rollout)
        states = select_states(
            trajectories,
            settings,
            num_rows=num_rows,
            block_size=4,
            mask_token_id=special.mask_token_id,
            end_token_ids=special.end_token_ids,
            pad_token_id=special.pad_token_id,
            seed=SEED,
            step=0,
        )
        logits_BTV = training_logits(model, states.clean_ids_BT, states.noisy_ids_BT, states.lengths_B, rollout)
    assert (states.is_committed_BT & states.is_trained_BT).any()
    num_compared = 0
    for row, position in states.is_trained_BT.nonzero().tolist():
        step = step_of_state(trajectories[row // num_rows], states.is_committed_BT[row], position)
        recorded = seen[row // num_rows, position, step]
        assert_equal_logits(logits_BTV[row, position], recorded, special)
        num_compared += 1
        if states.is_committed_BT[row, position]:
            token = states.clean_ids_BT[row, position]
            assert abs(recorded.log_softmax(0)[token] - states.log_probs_BT[row, position]) <= 1e-5
    if settings == StatesConfig(selection="all_steps"):
        positions = [(row, position) for row, position, _ in seen if is_counted(trajectories[row], position, special)]
        assert num_compared == len(positions), "every state that the rollout was in is trained"


def step_of_state(trajectory, is_committed_T: torch.Tensor, position: int) -> int:
    """The step of the rollout that saw the state of the block at `position`: that of its committed positions."""
    block = range(position // 4 * 4, position // 4 * 4 + 4)
    (step,) = {int(trajectory.step_map_R[i - trajectory.prompt_length]) for i in block if is_committed_T[i]}
    return step


def is_counted(trajectory, position: int, special) -> bool:
    """Whether the position counts, and is not the end token."""
    place = position - trajectory.prompt_length
    is_end = int(trajectory.terminal_ids_T[position]) in special.end_token_ids
    return place < trajectory.response_length and not is_end
