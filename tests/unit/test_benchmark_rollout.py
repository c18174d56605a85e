"""The variants of the rollout benchmark write the same tokens, and what they report of their cost is what they did.

The shipped teacher of the quickstart is the model. The plain sampler shares only the prompts with ours; the oracle of
the autoregressive variant is the greedy `generate` of `transformers`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_opdlm.observability.measurement import summarise
from tests.ranks import run_on_ranks
from tools.benchmark_rollout import QUICKSTART_TEACHER, compare, report
from tools.benchmark_rollout import measure as measure_in
from tools.rollout_variants import Figures, Sizes, build_ours, make_prompts

HF = str(QUICKSTART_TEACHER)
# Prompts of every remainder of a block, and more tokens than whole blocks of them.
TOY = Sizes(num_prompts=6, new_tokens=7)


@pytest.fixture(scope="module")
def world():
    """Leaves the one-process world that ours joins."""
    yield
    from megatron_opdlm.parallel.initialize import shut_down

    shut_down()


def measure(variant: str, sizes: Sizes) -> dict:
    return measure_in(variant, sizes, 1, HF)


def transformers_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(HF, dtype=torch.float32)


@pytest.mark.parametrize(
    "sizes",
    [
        TOY,
        replace(TOY, denoising_steps=2),
        replace(TOY, block_size=8, denoising_steps=3),
        replace(TOY, block_size=64, denoising_steps=5),  # no prompt has a whole block, so nothing is prefilled
    ],
    ids=str,
)
def test_the_plain_sampler_and_one_sequence_at_a_time_write_the_tokens_of_ours(world, sizes):
    ours, alone, plain = (measure(variant, sizes) for variant in ("ours", "one_at_a_time", "plain"))
    assert {len(prompt) % 4 for prompt in make_prompts(HF, sizes)} == {0, 1, 2, 3}
    assert ours["responses"] == alone["responses"] == plain["responses"]
    assert all(len(response) == sizes.new_tokens for response in ours["responses"])
    assert ours["num_written"] == plain["num_written"] > sizes.num_prompts * sizes.new_tokens
    assert len({token for response in ours["responses"] for token in response}) > 4, "other tokens would show"


def test_both_stop_at_the_end_tokens_where_these_count(world):
    sizes = replace(TOY, new_tokens=40, stop_at_end_tokens=True)
    ours, plain = measure("ours", sizes), measure("plain", sizes)
    assert ours["responses"] == plain["responses"] and ours["num_written"] == plain["num_written"]
    assert all(response.index(317) == len(response) - 1 for response in ours["responses"])
    assert len({len(response) for response in ours["responses"]}) > 3, "rows that end early wait for the others"


def test_blocks_of_one_token_with_shifted_logits_are_greedy_autoregressive_decoding(world):
    decoded = measure("teacher_autoregressive", TOY)
    model = transformers_model()
    model.generation_config.eos_token_id = None
    for prompt, response in zip(make_prompts(HF, TOY), decoded["responses"], strict=True):
        ids = torch.tensor([prompt])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
        assert response == written[0, len(prompt) :].tolist()
    assert any(317 in response[:-1] for response in decoded["responses"]), "decoding goes on behind an end token"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_plain_sampler_never_draws_the_mask_token_where_it_is_the_most_likely(temperature):
    from tools.plain_sampler import PlainSampler

    model, settings = transformers_model(), {"block_size": 4, "denoising_steps": 4, "new_tokens": 4}
    sampler = PlainSampler(model, [[1], [2]], mask_token_id=341, temperature=temperature, **settings)
    hidden_BKH = torch.ones(2, 4, model.config.hidden_size)
    model.lm_head.weight.data[341] = 1.0
    assert model.lm_head(hidden_BKH).argmax(-1).eq(341).all()
    drawn_BK, confidence_BK = sampler._draw(hidden_BKH)
    assert drawn_BK.shape == confidence_BK.shape == (2, 4) and not drawn_BK.eq(341).any()
    assert (confidence_BK > 0).all() and (confidence_BK <= 1).all()


@pytest.mark.parametrize("variant", ["ours", "one_at_a_time", "teacher_autoregressive"])
def test_figures_of_ours_count_the_tokens_that_its_model_reads(world, monkeypatch, variant):
    from megatron_opdlm.models.build import Qwen3Model

    seen: list[int] = []
    decode = build_ours(HF, TOY, variant)
    forward = Qwen3Model.forward
    monkeypatch.setattr(Qwen3Model, "forward", lambda self, ids, *a: seen.append(ids.numel()) or forward(self, ids, *a))
    figures = decode(make_prompts(HF, TOY)).figures
    assert (figures.num_forwards, figures.num_query_tokens) == (len(seen), sum(seen))


def test_figures_of_the_plain_sampler_count_the_tokens_that_its_model_reads(monkeypatch):
    from transformers import Qwen3Model

    seen: list[int] = []
    forward = Qwen3Model.forward
    monkeypatch.setattr(
        Qwen3Model, "forward", lambda self, ids, **k: seen.append(ids.numel()) or forward(self, ids, **k)
    )
    monkeypatch.setattr("tools.benchmark_rollout.NUM_WARM_UP_PROMPTS", TOY.num_prompts)
    figures = Figures(**measure("plain", TOY)["figures"])
    assert 2 * figures.num_forwards == len(seen), "once to warm up"
    assert 0 < 2 * figures.num_query_tokens < sum(seen), "rows that wait, and padding, do not count"
    assert 0 < figures.num_hidden_pairs < figures.num_pairs


def test_a_token_takes_one_forward_of_ours_and_a_quarter_more_of_the_plain_sampler(world):
    sizes = replace(TOY, new_tokens=40)
    ours, plain, teacher = (report(line(variant, sizes)) for variant in ("ours", "plain", "teacher_autoregressive"))
    assert ours["forwards_per_token"] == teacher["forwards_per_token"] == 1
    assert 1.2 < plain["forwards_per_token"] < 1.25, "a commit for every block but the last"
    assert 1 <= ours["model_forwards_per_token"] < 1.1 < plain["model_forwards_per_token"]
    assert ours["prefill_tokens"] == sum(len(prompt) // 4 * 4 for prompt in make_prompts(HF, sizes))
    assert ours["tokens_per_second"] == pytest.approx(6 * 40 / ours["seconds"], rel=1e-2)
    assert all(0 < figures["padding_waste"] < 1 for figures in (ours, plain))


def line(variant: str, sizes: Sizes) -> dict:
    return summarise([measure(variant, sizes)])


def test_a_ratio_says_how_many_responses_are_the_same():
    def made_up(variant: str, seconds: float, responses: list[list[int]]) -> dict:
        run = {"variant": variant, "seconds": [seconds], "step_mib": 1.0, "peak_mib": 2.0, "responses": responses}
        return summarise([run])

    ours = made_up("ours", 2.0, [[1, 2], [3, 4]])
    ratio = compare(ours, made_up("plain", 3.0, [[1, 2], [4, 3]]))
    assert (ratio["ratio"], ratio["speedup"], ratio["same_responses"]) == ("plain to ours", 1.5, 0.5)
    assert "same_responses" not in compare(ours, made_up("teacher_autoregressive", 1.0, [[1, 2], [3, 4]]))


def measure_stage(rank: int, variants: tuple[str, ...]) -> list[dict]:
    return [measure_and_leave(variant) for variant in variants]


def measure_and_leave(variant: str) -> dict:
    from megatron_opdlm.parallel.initialize import parallel_state

    measured = measure(variant, TOY)
    parallel_state.destroy_model_parallel()
    return measured


def test_two_stages_write_the_tokens_of_one_process_and_report_their_bubble(world):
    expected = measure("ours", TOY)["responses"]
    for stage in run_on_ranks(measure_stage, 2, ("pipeline_1", "pipeline_2")):
        assert [line["responses"] for line in stage] == [expected, expected]
        assert all(0 < report(summarise([line]))["bubble"] < 1 for line in stage)


def test_ranks_that_share_the_prompts_write_the_tokens_of_one_process(world):
    variants = ("ours_on_ranks", "plain_on_ranks")
    expected = measure("ours", TOY)
    for rank in run_on_ranks(measure_stage, 2, variants):
        assert [line["responses"] for line in rank] == [expected["responses"]] * 2
        assert [line["num_written"] for line in rank] == [expected["num_written"]] * 2
        assert rank[0]["figures"]["num_query_tokens"] == expected["figures"]["num_query_tokens"]


def test_the_command_prints_a_line_for_each_variant_without_torch_in_its_own_process():
    program = "import sys; from tools.benchmark_rollout import main; main(); assert 'torch' not in sys.modules"
    flags = ["--num-prompts", "2", "--new-tokens", "2", "--rounds", "1", "--threads", "1", "--variant", "plain"]
    finished = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, check=True)
    (printed,) = map(json.loads, finished.stdout.splitlines())
    assert printed["variant"] == "plain" and printed["tokens_per_second"] > 0


def test_a_wrong_size_is_refused_by_name():
    command = [sys.executable, "-m", "tools.benchmark_rollout", "--denoising-steps", "5"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "--denoising-steps (5) must not exceed --block-size (4)" in refused.stderr
