"""Metrics, writers, timers, the account of floating-point operations, and the report."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import logging
import re
import subprocess
import sys
import xml.dom.minidom

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_opdlm.config.load import save_config
from megatron_opdlm.config.schema import Config, LoggingConfig, RolloutConfig
from megatron_opdlm.observability import throughput
from megatron_opdlm.observability.logging import set_up_logging
from megatron_opdlm.observability.metrics import MetricAccumulator
from megatron_opdlm.observability.report import write_report
from megatron_opdlm.observability.throughput import ModelShape
from megatron_opdlm.observability.timers import PhaseTimers
from megatron_opdlm.observability.trajectories import TrajectoryWriter
from megatron_opdlm.observability.writers import (
    JsonlWriter,
    NullWriter,
    SafeWriters,
    TensorBoardWriter,
    build_writers,
    read_records,
)
from tests.kept_sequences import HOSTILE, SEQUENCE

TINY = ModelShape(
    num_layers=3,
    hidden_size=5,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=6,
    ffn_hidden_size=7,
    vocab_size=11,
)


def test_no_module_of_observability_imports_torch():
    program = (
        "import sys\n"
        "from megatron_opdlm.observability import charts, logging, metrics, report, throughput, timers, writers\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules), 'a heavy import'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- metrics


def test_means_are_weighted_and_sums_add_up():
    metrics = MetricAccumulator()
    metrics.add("train/loss", 2.0, weight=3)
    metrics.add("train/loss", 4.0)
    metrics.add("train/loss", 100.0, weight=0)
    metrics.add("never", 1.0, weight=0)
    metrics.add_sum("tokens", 5)
    metrics.add_sum("tokens", 7)
    assert metrics.values() == {"tokens": 12.0, "train/loss": 2.5}


def test_merging_ranks_equals_collecting_in_one_place():
    one, two, merged = MetricAccumulator(), MetricAccumulator(), MetricAccumulator()
    one.add("loss", 1.0, weight=1)
    one.add_sum("tokens", 1)
    two.add("loss", 4.0, weight=2)
    two.add_sum("tokens", 10)
    merged.merge([one, two])
    assert merged.values() == {"loss": 3.0, "tokens": 11.0}


def test_a_name_is_either_a_mean_or_a_sum():
    metrics = MetricAccumulator()
    metrics.add_sum("tokens", 1)
    with pytest.raises(AssertionError, match="tokens is a sum"):
        metrics.add("tokens", 1)


# --- timers


def test_a_phase_adds_up_also_when_it_fails_and_waits_for_the_device_at_both_ends():
    ticks, waits = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0]), []
    timers = PhaseTimers(synchronize=lambda: waits.append(1), clock=lambda: next(ticks))
    with timers.phase("rollout"):
        pass
    with timers.phase("teacher"):
        pass
    with pytest.raises(KeyError), timers.phase("rollout"):
        raise KeyError
    assert timers.seconds() == {"rollout": 6.0, "teacher": 1.0}
    assert len(waits) == 6
    timers.reset()
    assert timers.seconds() == {}


# --- writers


def test_each_step_is_one_json_object_on_disk_at_once(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(0, {"train/loss": 0.5, "train/grad_norm": float("inf")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "train/loss": 0.5, "train/grad_norm": null}\n'
    writer.close()


def test_resuming_drops_the_records_from_the_resumed_step_on_and_a_broken_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n{"step": 2, "a": 3}\n{"step": 3, "a"')
    writer = JsonlWriter(path, resume_step=2)
    writer.write(2, {"a": 30})
    writer.close()
    assert read_records(path) == [{"step": 0, "a": 1}, {"step": 1, "a": 2}, {"step": 2, "a": 30}]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_failing_writer_warns_once_and_the_others_go_on(tmp_path, caplog):
    class FullDisk:
        def write(self, step, metrics):
            raise OSError("No space left on device")

        def close(self):
            raise OSError("No space left on device")

    writers = SafeWriters([FullDisk(), JsonlWriter(tmp_path / "metrics.jsonl")])
    with caplog.at_level(logging.WARNING):
        writers.write(0, {"a": 1})
        writers.write(1, {"a": 2})
        writers.close()
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 0, "a": 1}, {"step": 1, "a": 2}]
    assert caplog.messages == ["FullDisk failed, metrics may be missing there: No space left on device"]


def test_tensorboard_shows_the_resumed_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, value in ((0, 1.0), (1, 2.0)):
        writer = TensorBoardWriter(tmp_path, resume_step)
        for step in range(resume_step, 3):
            writer.write(step, {"train/loss": value})
        writer.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(0, 1.0), (1, 2.0), (2, 2.0)]


def test_only_rank_0_writes(tmp_path):
    config = LoggingConfig(directory=str(tmp_path / "run"), tensorboard=False)
    writer = build_writers(config, rank=1, resume_step=0)
    writer.write(0, {"a": 1})
    writer.close()
    assert isinstance(writer, NullWriter) and not (tmp_path / "run").exists()
    writer = build_writers(config, rank=0, resume_step=0)
    writer.write(0, {"a": 1})
    writer.close()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"logging.directory \(.*file\) cannot be written"):
        build_writers(LoggingConfig(directory=str(tmp_path / "file")), rank=0, resume_step=0)


# --- logging


def test_rank_0_informs_and_the_others_only_warn(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        set_up_logging()
        set_up_logging()
        logging.getLogger("megatron_opdlm.rollout").info("fine")
        logging.getLogger("megatron_opdlm.rollout").warning("odd")
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["[rank 0] INFO fine", "[rank 0] WARNING odd", "[rank 1] WARNING odd"]


def test_what_megatron_says_of_every_model_is_left_out_and_nothing_else_of_it(caplog):
    set_up_logging()
    for name, message in (
        ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED. GPTModel is only accepting ..."),
        ("megatron.core.models.gpt.gpt_model", "something else"),
        ("megatron.core.distributed", "GPTModel IS DEPRECATED. As another logger says"),
    ):
        logging.getLogger(name).warning(message)
    assert caplog.messages == ["something else", "GPTModel IS DEPRECATED. As another logger says"]


# --- throughput


def test_the_papers_account_gives_its_published_total():
    assert throughput.paper_flops(8_000_000_000, 8_000_000_000, 66_000_000) == pytest.approx(4.2e18, rel=0.01)
    assert throughput.paper_flops(3, 5, 7) == 6 * 3 * 7 + 2 * 5 * 7


def test_parameters_are_those_of_the_published_models():
    heads = {"num_query_groups": 8, "head_dim": 128, "vocab_size": 151936}
    small = ModelShape(num_layers=28, hidden_size=1024, num_attention_heads=16, ffn_hidden_size=3072, **heads)
    large = ModelShape(num_layers=36, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=12288, **heads)
    assert throughput.num_parameters(small, tied_embeddings=True) == 596_049_920
    assert throughput.num_parameters(large, tied_embeddings=False) == 8_190_735_360


def test_linear_and_head_flops_equal_a_hand_count():
    # per layer: query 5x24, key and value 5x12 each, output 24x5, gate, up and down 5x7 each = 465 weights
    assert throughput.matrix_weights_per_layer(TINY) == 120 + 60 + 60 + 120 + 35 + 35 + 35
    assert throughput.linear_flops(TINY, 2) == 2 * 3 * 465 * 2
    assert throughput.attention_flops(TINY, 10) == 3 * 4 * 10 * (2 * 6 + 2 * 6)
    assert throughput.head_flops(TINY, 2) == 2 * 5 * 11 * 2


def test_a_token_costs_what_its_own_experts_and_the_router_cost():
    shape = dataclasses.replace(TINY, num_experts=8, num_experts_per_token=2)
    # attention 360 weights, router 5x8, two experts of 105
    assert throughput.matrix_weights_per_layer(shape) == 360 + 40 + 2 * 105
    dense = throughput.num_parameters(TINY, tied_embeddings=True)
    assert throughput.num_active_parameters(TINY, tied_embeddings=True) == dense
    assert throughput.num_active_parameters(shape, tied_embeddings=True) == dense + 3 * (40 + 105)
    assert throughput.num_parameters(shape, tied_embeddings=True) == dense + 3 * (40 + 7 * 105)


def test_forward_flops_equal_what_torch_counts_on_the_same_matrices():
    num_tokens = 9
    x, attended = torch.ones(num_tokens, 5), torch.ones(num_tokens, 24)
    heads = torch.ones(4, num_tokens, 6)
    with FlopCounterMode(display=False) as counter:
        for _ in range(TINY.num_layers):
            for width in (24, 12, 12, 7, 7):  # query, key, value, gate, up
                x @ torch.ones(5, width)
            attended @ torch.ones(24, 5)
            torch.ones(num_tokens, 7) @ torch.ones(7, 5)
            torch.bmm(torch.bmm(heads, heads.transpose(1, 2)), heads)
        x[:2] @ torch.ones(5, 11)
    counted = throughput.linear_flops(TINY, num_tokens) + throughput.attention_flops(TINY, num_tokens**2)
    assert counter.get_total_flops() == counted + throughput.head_flops(TINY, 2)


def test_pairs_equal_the_ones_in_the_mask():
    query, key = torch.arange(12)[:, None], torch.arange(12)
    assert throughput.causal_pairs(12) == int((key <= query).sum())
    for block_size in (1, 3, 4):
        visible = key // block_size <= query // block_size
        assert throughput.block_causal_pairs(12, block_size) == int(visible.sum())


def test_a_training_step_costs_three_forwards_of_two_streams_and_one_of_the_teacher():
    # block size 2, 4 tokens: pairs 2x2 + 2x4 = 12 per stream; causal pairs 10; 3 trained positions
    student = 2 * 3 * 465 * 8 + 3 * 4 * 24 * (12 + 12) + 2 * 5 * 11 * 3
    teacher = 2 * 3 * 465 * 4 + 3 * 4 * 24 * 10 + 2 * 5 * 11 * 3
    assert throughput.student_training_flops(TINY, 4, 3, block_size=2) == 3 * student
    assert throughput.teacher_flops(TINY, 4, 3) == teacher


def test_a_rollout_costs_its_prefill_its_denoising_steps_and_the_clean_blocks():
    # block size 2, prompt of 3: block 0 prefilled; block 1 (one prompt, one masked position) takes 1 step,
    # block 2 takes 2 steps with 2 and 1 masked positions; block 1 enters the cache, block 2 does not.
    tokens = 2 + 2 + 2 + 2 * 2
    pairs = 2 * 2 + 2 * 4 + 2 * 4 + 2 * (2 * 6)
    expected = 2 * 3 * 465 * tokens + 3 * 4 * 24 * pairs + 2 * 5 * 11 * (1 + 2 + 1)
    assert throughput.rollout_flops(TINY, 3, [1, 2], num_predictions=4, block_size=2) == expected


# --- report


def run_directory(tmp_path, num_steps: int):
    save_config(Config(rollout=RolloutConfig(block_size=8)), tmp_path / "config.yaml")
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for step in range(num_steps):
        writer.write(step, {"train/loss": 2.0 - step, "perf/seconds_rollout": 1.5, "rollout/tokens": 1000})
    writer.close()
    return tmp_path


def test_the_report_is_one_page_that_fetches_nothing(tmp_path):
    page = write_report(run_directory(tmp_path, 3), {"Accuracy": {"teacher": {"sums": 0.91}}}).read_text()
    assert not re.search(r"https?:|<link|@import|src=|url\(", page)
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_report_draws_what_was_recorded_and_leaves_out_the_rest(tmp_path):
    page = write_report(run_directory(tmp_path, 3)).read_text()
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    names = [xml.dom.minidom.parseString(picture).documentElement.getAttribute("aria-label") for picture in pictures]
    assert names == ["Loss: from 2 to 0", "Seconds per step"]
    assert "2 → 0" in page and "3 training steps, 3,000 response tokens" in page
    assert "Trajectories" not in page


def test_the_policy_allows_the_page_its_own_style_sheet_and_script_alone(tmp_path):
    page = write_report(run_directory(tmp_path, 1)).read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)[1]
    contents = [re.search(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)[1] for name in ("style", "script")]
    style, script = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}';")


def test_no_text_of_a_run_can_end_the_data_of_the_page(tmp_path):
    TrajectoryWriter(run_directory(tmp_path, 1) / "trajectories.jsonl", 0).write([SEQUENCE])
    page = write_report(tmp_path).read_text()
    assert HOSTILE in SEQUENCE.texts.values() and HOSTILE not in page
    assert page.count("</script>") == 2, "of the data and of the script"
    data = re.search(r'<script type="application/json" id="trajectories-data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data)["texts"] == SEQUENCE.texts
    assert page.index('id="viewer"') < page.index('id="trajectories-data"')


def test_the_report_tells_changed_settings_and_results_with_text_escaped(tmp_path):
    results = {"Accuracy": {"teacher": {"sums": 0.91234}, "a<b": {"counts": 320849.0}}, "note": "x & y"}
    page = write_report(run_directory(tmp_path, 1), results).read_text()
    changed = page[page.index("differ from the defaults") : page.index("All settings")]
    assert re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", changed) == [("rollout.block_size", "8")]
    assert "<tr><th>training.num_prompts_per_step</th><td>128</td></tr>" in page
    assert "<tr><th></th><th>sums</th><th>counts</th></tr>" in page
    assert "<tr><th>teacher</th><td>0.9123</td><td></td></tr>" in page
    assert "<tr><th>a&lt;b</th><td></td><td>320,849</td></tr>" in page
    assert "<tr><th>note</th><td>x &amp; y</td></tr>" in page


def test_the_report_of_an_empty_run_has_the_results_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "train/loss": None}) + "\n")
    page = write_report(tmp_path, {"speed": 3}).read_text()
    assert "<tr><th>speed</th><td>3</td></tr>" in page
    with pytest.raises(ValueError, match="there is no run directory"):
        write_report(tmp_path / "absent")
