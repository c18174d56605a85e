"""The rollout against a decoder without cache or batch.

The decoder of `tests/references.py` reads the whole sequence with `transformers` in float64 in every step, and gets the
same uniform numbers.
"""

from __future__ import annotations

import functools
import json

import pytest
import torch

from megatron_opdlm.config.schema import ParallelConfig, RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.randomness import sequence_generator
from megatron_opdlm.diffusion.states import select_states
from tests.references import decode_slowly, load_reference
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, load_student, tiny_config

SEED, STEP, NUM_ROWS = 11, 3, 52
STOP_TOKEN_IDS = [5, 17]
PROMPT_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 13)
"""Every remainder of a block of 4 and of 8, prompts of less than a block, of whole blocks and of more."""
CASES = {
    "static": {"remasking_strategy": "low_confidence_static"},
    "static, two at a time": {"remasking_strategy": "low_confidence_static", "denoising_steps_per_block": 2},
    "static, a block at once": {"remasking_strategy": "low_confidence_static", "denoising_steps_per_block": 1},
    "dynamic": {"dynamic_threshold": 0.1},
    "dynamic, 3 steps for 8": {"dynamic_threshold": 0.15, "block_size": 8, "denoising_steps_per_block": 3},
    "dynamic, threshold 0": {"dynamic_threshold": 0.0},
    "sequential, 3 steps for 8": {
        "remasking_strategy": "sequential",
        "block_size": 8,
        "denoising_steps_per_block": 3,
    },
    "entropy-bounded": {"remasking_strategy": "entropy_bounded", "entropy_bound": 7.0},
    "entropy-bounded, top-p, 8": {
        "remasking_strategy": "entropy_bounded",
        "entropy_bound": 7.0,
        "block_size": 8,
        "top_p": 0.6,
    },
    "temperature 0": {"temperature": 0.0, "dynamic_threshold": 0.2},
    "temperature 0.5": {"temperature": 0.5, "dynamic_threshold": 0.2},
    "shifted logits": {"logit_shift": "next_token", "dynamic_threshold": 0.1},
    "shifted logits, static": {"logit_shift": "next_token", "remasking_strategy": "low_confidence_static"},
    "shifted logits, 8": {"logit_shift": "next_token", "dynamic_threshold": 0.15, "block_size": 8},
    "top-k": {"top_k": 5, "dynamic_threshold": 0.1},
    "top-p": {"top_p": 0.6, "dynamic_threshold": 0.1},
    "top-k and top-p, warm": {"top_k": 8, "top_p": 0.8, "temperature": 1.3, "dynamic_threshold": 0.1},
}
MAX_NEW_TOKENS = 10


def rollout_settings(**settings) -> RolloutConfig:
    return RolloutConfig(max_new_tokens=MAX_NEW_TOKENS, stop_token_ids=STOP_TOKEN_IDS, **settings)


def random_prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 44, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    return [Prompt(prompt_id=100 + row, token_ids=tuple(prompt)) for row, prompt in enumerate(ids)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def reference(folder):
    return load_reference(folder)


@pytest.fixture
def student(folder, world_of_one):
    with layout(ParallelConfig()) as groups:
        yield load_student(tiny_config(folder, rollout=rollout_settings()), groups)


def generate(student, settings: RolloutConfig, prompts=None, batch_size: int | None = None):
    """The engine after decoding all prompts, and their trajectories."""
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    model, special = student
    engine = RolloutEngine(model, settings, special, SEED)
    if batch_size:
        engine.rollout = RolloutConfig(**(vars(settings) | {"batch_size": batch_size}))
    tasks = [RolloutTask(prompt, settings.max_new_tokens) for prompt in prompts or random_prompts()]
    return engine, engine.generate(tasks, STEP)


def uniforms_of(prompt_id: int, settings: RolloutConfig):
    generator = sequence_generator(SEED, STEP, prompt_id, 0, purpose="rollout")
    shape = settings.denoising_steps_per_block, settings.block_size
    while True:
        yield torch.rand(shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_step_maps_equal_those_of_a_decoder_without_a_cache(student, reference, case):
    settings, special = rollout_settings(**CASES[case]), student[1]
    decode = functools.partial(decode_slowly, reference, settings=settings)
    rules = {"mask_token_id": special.mask_token_id, "end_token_ids": special.end_token_ids}
    for prompt, trajectory in zip(random_prompts(), generate(student, settings)[1], strict=True):
        slow = decode(list(prompt.token_ids), uniforms_of(prompt.prompt_id, settings), **rules)
        assert trajectory.terminal_ids_T.tolist() == slow.terminal_ids
        assert trajectory.step_map_R.tolist() == slow.step_map
        assert (trajectory.log_probs_R - torch.tensor(slow.log_probs)).abs().max() <= 1e-4
        assert int(trajectory.steps_by_block_MK.amax(1).sum()) == slow.num_steps


@pytest.mark.parametrize("case", ["static", "dynamic", "dynamic, 3 steps for 8"])
def test_forwards_are_the_denoising_steps_of_the_slowest_row_since_prefill_and_commits_share_them(student, case):
    engine, trajectories = generate(student, rollout_settings(**CASES[case]))
    steps = [int(t.steps_by_block_MK.amax(1).sum()) for t in trajectories]
    assert engine.statistics.num_forwards == max(steps)
    assert engine.statistics.num_sequence_steps == sum(steps)


def test_a_response_counts_up_to_its_first_end_token_or_its_limit_and_keeps_its_last_block_whole(student):
    end_ids = set(student[1].end_token_ids)
    reasons = set()
    for case in ("static", "dynamic", "dynamic, 3 steps for 8"):
        settings = rollout_settings(**CASES[case])
        for trajectory in generate(student, settings)[1]:
            response = trajectory.terminal_ids_T[trajectory.prompt_length :].tolist()
            ends = [place for place, token in enumerate(response[:MAX_NEW_TOKENS]) if token in end_ids]
            expected = ("end_token", ends[0] + 1) if ends else ("length", MAX_NEW_TOKENS)
            assert (trajectory.stop_reason, trajectory.response_length) == expected
            last_counted = trajectory.prompt_length + trajectory.response_length - 1
            blocks_read = last_counted // settings.block_size + 1
            assert len(trajectory.terminal_ids_T) == blocks_read * settings.block_size
            reasons.add((trajectory.stop_reason, len(response) > trajectory.response_length))
    assert reasons == {(reason, True) for reason in ("end_token", "length")} | {("end_token", False), ("length", False)}


def test_defect_7_a_prompt_is_never_overwritten_where_fewer_masks_are_left_than_a_step_commits(student):
    """One mask beside seven prompt tokens, and a step that commits up to eight."""
    settings = rollout_settings(block_size=8, denoising_steps_per_block=1, remasking_strategy="low_confidence_static")
    for prompt, trajectory in zip(random_prompts(), generate(student, settings)[1], strict=True):
        assert trajectory.terminal_ids_T[: len(prompt.token_ids)].tolist() == list(prompt.token_ids)
        assert trajectory.step_map_R.unique().tolist() == [1]


def prefer(model, token_id: int) -> None:
    """Makes `token_id` by far the most likely token wherever one half of all hidden states points."""
    with torch.no_grad():
        model.output_weight[token_id] = 20 * model.output_weight[:44].mean(0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_defect_6_the_mask_token_is_never_drawn_where_it_is_the_most_likely(student, monkeypatch, temperature):
    model, special = student
    prefer(model, special.mask_token_id)
    prefers_mask, logits_of = [], model.vocab_parallel_logits
    monkeypatch.setattr(
        model,
        "vocab_parallel_logits",
        lambda hidden: prefers_mask.append(logits_of(hidden).argmax(-1) == special.mask_token_id) or logits_of(hidden),
    )
    settings = rollout_settings(temperature=temperature, dynamic_threshold=0.1)
    for trajectory in generate(student, settings)[1]:
        assert special.mask_token_id not in trajectory.terminal_ids_T
        assert torch.isfinite(trajectory.log_probs_R).all()
    assert torch.cat(prefers_mask).float().mean() > 0.2, "the test must put the mask token in the lead"


def test_defect_4_special_tokens_reach_the_trained_states_as_ids(student, folder):
    """`<think>` would be lost or cut up on a way through text."""
    from transformers import AutoTokenizer

    think = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<think>")
    model, special = student
    prefer(model, think)
    settings = rollout_settings(dynamic_threshold=0.1)
    trajectories = generate(student, settings)[1]
    written = torch.cat([trajectory.response_ids for trajectory in trajectories])
    assert (written == think).sum() > 5
    states = select_states(
        trajectories,
        block_size=4,
        mask_token_id=special.mask_token_id,
        end_token_ids=special.end_token_ids,
        pad_token_id=special.pad_token_id,
        seed=SEED,
        step=STEP,
    )
    for row, trajectory in enumerate(trajectories):
        num_tokens = len(trajectory.terminal_ids_T)
        assert states.clean_ids_BT[row, :num_tokens].equal(trajectory.terminal_ids_T)


@pytest.mark.parametrize("enable_thinking", [False, True])
def test_what_opens_and_closes_thinking_goes_through_decoding_as_ids(student, folder, tmp_path, enable_thinking):
    """As in Qwen3's template, a prompt that shall not think gets its thoughts, empty ones, written for it."""
    from transformers import AutoTokenizer

    from megatron_opdlm.data.prompts import read_prompts

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    think, done = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    rows = [{"question": f"{number}+1="} for number in (1, 22, 333, 4444)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prompts = read_prompts(
        [tmp_path / "rows.json"],
        tokenizer,
        max_prompt_tokens=100,
        apply_chat_template=True,
        enable_thinking=enable_thinking,
    ).prompts
    model, special = student
    assert not {think, done} & set(special.end_token_ids), "a response goes on behind its thoughts"
    prefer(model, think)
    trajectories = generate(student, rollout_settings(dynamic_threshold=0.1), prompts)[1]
    for prompt, trajectory in zip(prompts, trajectories, strict=True):
        assert [prompt.token_ids.count(token) for token in (think, done)] == [not enable_thinking] * 2
        assert trajectory.terminal_ids_T[: trajectory.prompt_length].tolist() == list(prompt.token_ids)
    behind_think = [t.response_ids.tolist().index(think) + 1 for t in trajectories if think in t.response_ids]
    assert behind_think and any(t.response_length > min(behind_think) for t in trajectories)


@pytest.mark.parametrize("case", ["dynamic", "dynamic, 3 steps for 8", "top-p"])
def test_a_sequence_does_not_depend_on_what_else_is_in_its_batch(student, case):
    settings = rollout_settings(**CASES[case])
    expected = generate(student, settings)[1]
    for batch_size, prompts in ((1, random_prompts()), (2, random_prompts()[::-1]), (4, random_prompts()[::2])):
        by_prompt = {t.prompt_id: t for t in generate(student, settings, prompts, batch_size)[1]}
        assert list(by_prompt) == [prompt.prompt_id for prompt in prompts]
        for trajectory in expected:
            if (other := by_prompt.get(trajectory.prompt_id)) is not None:
                assert other.terminal_ids_T.equal(trajectory.terminal_ids_T)
                assert other.step_map_R.equal(trajectory.step_map_R)
