"""What a sequence becomes depends neither on its company, nor on chunks, pages or evictions."""

from __future__ import annotations

import dataclasses
import logging
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from megatron_opdlm.config.schema import ParallelConfig, RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.trajectory import Trajectory
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, load_student, tiny_config

PROMPT_LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 30, 64, 65, 130, 6, 11, 12, 16, 17, 40]
CASES = {
    "static": {"remasking_strategy": "low_confidence_static"},
    "dynamic": {"dynamic_threshold": 0.1},
    "dynamic, 3 steps for 8": {"dynamic_threshold": 0.15, "block_size": 8, "denoising_steps_per_block": 3},
    "sequential": {"remasking_strategy": "sequential", "denoising_steps_per_block": 2},
    "entropy bounded": {"remasking_strategy": "entropy_bounded", "entropy_bound": 7.0},
    "shifted logits": {"logit_shift": "next_token", "dynamic_threshold": 0.1},
    "one token after the other": {"block_size": 1, "denoising_steps_per_block": 1, "logit_shift": "next_token"},
}
PAGE_GIB = 2 * 4 * 2 * 2 * 12 * 4 / 2**30
"""Keys and values of 4 tokens: 2 layers of 2 key-value heads of 12 float32 numbers."""
COMPANIES = {
    "alone": {"batch_size": 1},
    "7 at a time": {"batch_size": 7},
    "prompts in chunks of two blocks": {"max_tokens_in_flight": 16},
    "chunks among others": {"max_tokens_in_flight": 64},
    "evicted from a tiny cache": {"cache_gib": 58 * PAGE_GIB},
}


def prompts(rounds: int = 1) -> list[Prompt]:
    """One of each length, so many times over; no two have the same tokens."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 44, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS * rounds]
    return [Prompt(prompt_id=100 + row, token_ids=tuple(prompt)) for row, prompt in enumerate(ids)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("hf"))


@pytest.fixture(autouse=True)
def short_pages(monkeypatch):
    monkeypatch.setattr("megatron_opdlm.rollout.paged_attention.LONGEST_PAGE", 4)


@pytest.fixture
def student(folder, world_of_one):
    with layout(ParallelConfig()) as groups:
        yield load_student(tiny_config(folder, rollout=RolloutConfig(stop_token_ids=[5, 17])), groups)


def generate(student, rollout: RolloutConfig, order: list[int] | None = None, rounds: int = 1, **task):
    """The engine's statistics, and the trajectories by prompt."""
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    model, special = student
    engine = RolloutEngine(model, rollout, special, seed=11)
    rows = prompts(rounds) if order is None else [prompts(rounds)[row] for row in order]
    trajectories = engine.generate([RolloutTask(prompt, rollout.max_new_tokens, **task) for prompt in rows], step=3)
    assert [t.prompt_id for t in trajectories] == [prompt.prompt_id for prompt in rows]
    return engine.statistics, {t.prompt_id: t for t in trajectories}


def assert_same(actual: dict[int, Trajectory], expected: dict[int, Trajectory]) -> None:
    assert actual.keys() <= expected.keys()
    for prompt_id, trajectory in actual.items():
        other = expected[prompt_id]
        assert trajectory.terminal_ids_T.equal(other.terminal_ids_T)
        assert trajectory.step_map_R.equal(other.step_map_R)
        assert (trajectory.log_probs_R - other.log_probs_R).abs().max() <= 1e-5
        assert (trajectory.response_length, trajectory.stop_reason) == (other.response_length, other.stop_reason)


@pytest.mark.parametrize("case", CASES)
def test_no_company_changes_a_trajectory(student, case):
    rollout = RolloutConfig(max_new_tokens=72, stop_token_ids=[5, 17], batch_size=64, **CASES[case])
    _, expected = generate(student, rollout)
    for name, settings in COMPANIES.items():
        statistics, actual = generate(student, dataclasses.replace(rollout, **settings))
        assert_same(actual, expected)
        assert (statistics.num_preemptions > 0) == (name == "evicted from a tiny cache")
        assert statistics.peak_pages <= statistics.num_pages
    for order in (list(reversed(range(18))), list(torch.randperm(18).tolist())):
        assert_same(generate(student, rollout, order)[1], expected)


@pytest.mark.parametrize("case", ["static", "dynamic"])
def test_batches_of_1_7_and_64_decode_the_same(student, monkeypatch, case):
    from megatron_opdlm.rollout.scheduler import Scheduler

    widths, plan, expected = [], Scheduler.plan, None

    def counted(scheduler):
        planned = plan(scheduler)
        widths.append(0 if planned is None else len(planned.slots_A))
        return planned

    monkeypatch.setattr(Scheduler, "plan", counted)
    for size in (1, 7, 64):
        widths.clear()
        rollout = RolloutConfig(max_new_tokens=8, stop_token_ids=[5, 17], batch_size=size, **CASES[case])
        _, actual = generate(student, rollout, rounds=7)
        assert max(widths) == size, "sequences in one forward"
        expected = expected or actual
        assert_same(actual, expected)


def test_where_a_page_ends_makes_no_difference(student, monkeypatch):
    rollout = RolloutConfig(max_new_tokens=72, stop_token_ids=[5, 17], dynamic_threshold=0.1)
    _, expected = generate(student, rollout)
    for size in (16, 50, 4096):
        monkeypatch.setattr("megatron_opdlm.rollout.paged_attention.LONGEST_PAGE", size)
        assert_same(generate(student, rollout)[1], expected)


def test_a_slot_is_refilled_as_soon_as_its_sequence_is_done(student):
    """One sequence needs as many steps as all others together; two slots then take no more forwards than that one."""
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    rollout = RolloutConfig(remasking_strategy="low_confidence_static", batch_size=2, temperature=0)
    model, special = student
    special = dataclasses.replace(special, end_token_ids=())
    engine = RolloutEngine(model, rollout, special, seed=1)
    four = Prompt(prompt_id=0, token_ids=(1, 2, 3, 4))
    engine.generate([RolloutTask(four, limit) for limit in (8, 32, 8, 8, 8)], step=0)
    assert engine.statistics.num_forwards == 32
    assert engine.statistics.num_sequence_steps == 64


def test_a_forward_reads_no_more_tokens_than_the_budget(student, monkeypatch):
    from megatron_opdlm.rollout import block_decoder

    sizes, forward = [], block_decoder.cached_forward
    monkeypatch.setattr(
        block_decoder, "cached_forward", lambda m, c, placed: sizes.append(len(placed.ids_T)) or forward(m, c, placed)
    )
    rollout = RolloutConfig(max_new_tokens=8, max_tokens_in_flight=24)
    statistics, _ = generate(student, rollout)
    assert max(sizes) <= 24
    assert sum(sizes) == statistics.num_query_tokens
    assert statistics.num_clean_tokens >= sum(length // 4 * 4 for length in PROMPT_LENGTHS)


def test_a_row_has_its_own_temperature_seed_and_limit(student):
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    model, special = student
    rollout = RolloutConfig(max_new_tokens=12, dynamic_threshold=0.1)
    rows = [{}, {"temperature": 0.0}, {"temperature": 1.7}, {"seed": 5}, {"sample_index": 1}]
    tasks = [RolloutTask(prompts()[7], 4 + 4 * row, **settings) for row, settings in enumerate(rows)]
    together = RolloutEngine(model, rollout, special, seed=11).generate(tasks, step=3)
    for task, trajectory in zip(tasks, together, strict=True):
        temperature = rollout.temperature if task.temperature is None else task.temperature
        alone = dataclasses.replace(rollout, temperature=temperature)
        engine = RolloutEngine(model, alone, special, seed=11 if task.seed is None else task.seed)
        plain = RolloutTask(task.prompt, task.max_new_tokens, task.sample_index)
        assert_same({0: trajectory}, {0: engine.generate([plain], step=3)[0]})
    assert len({tuple(t.response_ids[:4].tolist()) for t in together}) > 3, "the settings must make a difference"


def test_a_threshold_of_its_own_holds_for_one_call(student):
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    model, special = student
    rollout = RolloutConfig(max_new_tokens=12, dynamic_threshold=0.01)
    engine, tasks = RolloutEngine(model, rollout, special, seed=11), [RolloutTask(prompts()[7], 12)]
    (usual,), (careful,), (usual_again,) = (engine.generate(tasks, 3, *own) for own in ((), (1.0,), ()))
    strict = RolloutEngine(model, dataclasses.replace(rollout, dynamic_threshold=1.0), special, seed=11)
    assert_same({0: careful}, {0: strict.generate(tasks, step=3)[0]})
    assert_same({0: usual_again}, {0: usual})
    assert careful.tokens_per_step < usual.tokens_per_step


def test_a_cache_too_small_for_the_longest_sequence_is_refused(student):
    with pytest.raises(ValueError, match=r"rollout.cache_gib \(2.86e-06\) must be at least .* of 204 tokens"):
        generate(student, RolloutConfig(max_new_tokens=72, cache_gib=2 * PAGE_GIB))


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        result = function(*arguments, **(settings or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_memory_grows_linearly_up_to_a_context_of_16_thousand_tokens(student):
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    model, special = student
    largest = {}
    for length in (4096, 16384):
        prompt = Prompt(prompt_id=0, token_ids=tuple(range(40)) * (length // 40))
        engine = RolloutEngine(model, RolloutConfig(max_tokens_in_flight=2048), special, seed=1)
        with LargestTensor() as seen:
            (trajectory,) = engine.generate([RolloutTask(prompt, 8)], step=0)
        largest[length] = seen.num_elements
        assert len(trajectory.terminal_ids_T) > len(prompt.token_ids)
    assert largest[16384] <= 4.5 * largest[4096]
    assert largest[16384] < 16384 * 16384 / 16, "no mask of all pairs of positions"


def test_the_size_of_the_cache_is_said_once(student, caplog):
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    model, special = student
    engine = RolloutEngine(model, RolloutConfig(max_new_tokens=8), special, seed=11)
    with caplog.at_level(logging.INFO):
        for step in range(2):
            engine.generate([RolloutTask(prompts()[7], 8)], step)
    (said,) = (record.getMessage() for record in caplog.records if "key-value cache" in record.getMessage())
    assert said.startswith("key-value cache: ") and said.endswith(" for up to 1 sequences of up to 20 tokens")


def test_the_progress_bar_counts_sequences_and_says_tokens_per_second(student, monkeypatch, capsys):
    from megatron_opdlm.rollout import generation
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    model, special = student
    at_once = {"delay": 0, "mininterval": 0, "miniters": 1}
    monkeypatch.setattr(generation, "tqdm", lambda **options: tqdm(**options | at_once))
    for show_progress in (False, True):
        engine = RolloutEngine(model, RolloutConfig(max_new_tokens=8), special, seed=11, show_progress=show_progress)
        engine.generate([RolloutTask(prompt, 8) for prompt in prompts()[:3]], step=0)
        shown = capsys.readouterr().err
        assert bool(shown) == show_progress
    assert re.findall(r"\rrollout: [^\r]* (\d)/3 ", shown) == ["1", "2", "3"]
    assert re.search(r" 3/3 [^\r]*, [1-9]\d* tokens/s\]", shown), shown
