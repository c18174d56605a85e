"""A sequence with a logit that is not finite ends there, is counted and trained nowhere; the others do not notice.

One row of the embedding is NaN. Whoever has read that token has no finite logits from then on; the run with sound
weights says what all the others must decode.
"""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.config.schema import ParallelConfig, RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.states import select_states
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard
from megatron_opdlm.rollout.token_sampling import draw_tokens
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, load_student, tiny_config

SICK_TOKEN, SICK_PROMPT = 40, 103
PROMPT_LENGTHS = [5, 9, 4, 30, 8, 3, 7, 12, 2, 10, 5, 6]
SETTINGS = {
    "static": {"remasking_strategy": "low_confidence_static"},
    "dynamic": {"dynamic_threshold": 0.1},
    "entropy bounded": {"remasking_strategy": "entropy_bounded", "entropy_bound": 7.0},
    "greedy": {"temperature": 0.0},
    "filtered": {"top_k": 30, "top_p": 0.9},
    "nucleus": {"top_p": 0.9},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def student(folder, world_of_one, monkeypatch):
    monkeypatch.setattr("megatron_opdlm.rollout.paged_attention.LONGEST_PAGE", 16)
    with layout(ParallelConfig()) as groups:
        yield load_student(tiny_config(folder), groups)


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, SICK_TOKEN, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    ids[3][-1] = SICK_TOKEN
    return [Prompt(prompt_id=100 + row, token_ids=tuple(prompt)) for row, prompt in enumerate(ids)]


def generate(student, **settings) -> list[Trajectory]:
    """Two sequences at a time, so that all but the first two get pages that others had."""
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    model, special = student
    engine = RolloutEngine(model, RolloutConfig(max_new_tokens=16, batch_size=2, **settings), special, seed=1)
    return engine.generate([RolloutTask(prompt, 16) for prompt in prompts()], step=0)


def make_sick(student) -> None:
    embedding = student[0].chunks[0].embedding.word_embeddings.weight
    with torch.no_grad():
        embedding[SICK_TOKEN] = torch.nan


@pytest.mark.parametrize("name", SETTINGS)
def test_a_sick_sequence_ends_and_the_others_decode_what_they_would_have(student, name):
    sound = generate(student, **SETTINGS[name])
    make_sick(student)
    num_untouched = 0
    for expected, actual in zip(sound, generate(student, **SETTINGS[name]), strict=True):
        if SICK_TOKEN in expected.terminal_ids_T:
            assert_ends_early(expected, actual)
        else:
            assert_same(actual, expected)
            num_untouched += 1
    assert 6 <= num_untouched < len(sound)


def assert_same(actual: Trajectory, expected: Trajectory) -> None:
    """To the rounding of forwards in other company."""
    assert (actual.prompt_id, actual.stop_reason) == (expected.prompt_id, expected.stop_reason)
    assert torch.equal(actual.terminal_ids_T, expected.terminal_ids_T)
    assert torch.equal(actual.step_map_R, expected.step_map_R)
    torch.testing.assert_close(actual.log_probs_R, expected.log_probs_R, atol=1e-5, rtol=0)


def assert_ends_early(sound: Trajectory, sick: Trajectory) -> None:
    """The clean blocks are those of the sound run. A token that is read by nobody afterwards does no harm."""
    read_at = int((sound.terminal_ids_T == SICK_TOKEN).nonzero()[0])
    if sick.stop_reason != "not_finite":
        assert read_at >= len(sound.terminal_ids_T) - 4
        return assert_same(sick, sound)
    last_block = len(sick.terminal_ids_T) - 4
    assert read_at < len(sick.terminal_ids_T)
    assert torch.equal(sick.terminal_ids_T[:last_block], sound.terminal_ids_T[:last_block])
    assert sick.response_length == max(1, last_block - sick.prompt_length)


def test_a_prompt_that_is_sick_gives_a_block_that_is_trained_nowhere(student, caplog):
    make_sick(student)
    trajectories = generate(student)
    (sick,) = [trajectory for trajectory in trajectories if trajectory.prompt_id == SICK_PROMPT]
    assert (sick.stop_reason, sick.response_length, len(sick.terminal_ids_T)) == ("not_finite", 1, 32)
    assert sick.log_probs_R.isfinite().all()
    assert "the student's logits were not finite in" in caplog.text and str(SICK_PROMPT) in caplog.text
    tokens = {"mask_token_id": student[1].mask_token_id, "end_token_ids": student[1].end_token_ids, "pad_token_id": 0}
    states = select_states(trajectories, block_size=4, seed=0, step=0, train_on_end_token=True, **tokens)
    is_sick_B = torch.tensor([trajectory.stop_reason == "not_finite" for trajectory in trajectories])
    assert is_sick_B.any() and not states.is_trained_BT[is_sick_B].any()
    assert states.is_trained_BT[~is_sick_B].any(1).all()
    assert states.prompt_ids_B.tolist() == [100 + row for row in range(len(PROMPT_LENGTHS))]


def test_the_pages_of_a_sick_sequence_that_is_preempted_harm_nobody(student):
    """The sick prompt is read in chunks; half way, the other sequence takes its pages, and grows into them."""
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    model, special = student
    generator = torch.Generator().manual_seed(0)
    others, sick = (torch.randint(0, SICK_TOKEN, (length,), generator=generator).tolist() for length in (14, 240))
    sick[2] = SICK_TOKEN
    tasks = [RolloutTask(Prompt(1, tuple(others)), 256), RolloutTask(Prompt(2, tuple(sick)), 8)]
    page = 16 * 2 * 2 * 2 * 12 * 4 / 2**30
    rollout = RolloutConfig(
        max_new_tokens=256, batch_size=2, max_tokens_in_flight=16, cache_gib=19.5 * page, stop_token_ids=[]
    )

    def decode() -> list[Trajectory]:
        engine = RolloutEngine(model, rollout, special, seed=1)
        trajectories = engine.generate(tasks, step=0)
        assert engine.statistics.num_preemptions >= 1
        return trajectories

    expected, _ = decode()
    make_sick(student)
    actual, of_sick = decode()
    assert of_sick.stop_reason == "not_finite"
    assert SICK_TOKEN not in expected.terminal_ids_T and len(expected.terminal_ids_T) > 64
    assert_same(actual, expected)


@pytest.mark.parametrize("sick", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [None, 0.0, 0.7])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}])
def test_one_logit_that_is_not_finite_leaves_no_log_probability_and_harms_no_other_position(sick, temperature, filters):
    logits_NV = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    shard = VocabularyShard(0, 9, 8, mask_token_id=7, group=None)
    temperatures_N = None if temperature is None else torch.full((3,), temperature)

    def draw(logits_NV: torch.Tensor):
        uniforms_N = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        return draw_tokens(logits_NV.clone(), uniforms_N, temperatures_N, shard, with_entropy=True, **filters)

    sound = draw(logits_NV)
    logits_NV[1, 4] = sick
    drawn = draw(logits_NV)
    assert drawn.log_probs_N.isnan().tolist() == [False, True, False]
    others = torch.tensor([0, 2])
    assert torch.equal(drawn.ids_N[others], sound.ids_N[others])
    assert torch.equal(drawn.log_probs_N[others], sound.log_probs_N[others])
