"""Tokens per second of the rollout, against one sequence at a time, a plain sampler and autoregressive decoding.

    python tools/benchmark_rollout.py

prints one JSON line per variant and one per variant with the ratio of its time to that of ours. On two cores of an
Intel Xeon at 2.5 GHz, torch 2.13.0, November 2026, shortened:

    {"variant": "ours", "seconds": 2.589, "tokens_per_second": 3164.4, "forwards_per_token": 1.0, ...}
    {"variant": "one_at_a_time", "seconds": 100.8, "tokens_per_second": 81.2, "model_forwards_per_token": 128.0, ...}
    {"variant": "plain", "seconds": 2.34, "tokens_per_second": 3501.1, "forwards_per_token": 1.2399, ...}
    {"variant": "teacher_autoregressive", "seconds": 1.644, "tokens_per_second": 4982.6, "forwards_per_token": 1.0, ...}
    {"ratio": "plain to ours", "speedup": 0.9, ..., "same_responses": 1.0}

A CPU's time goes with the tokens, of which the plain sampler reads as many; that ours takes a fifth fewer forwards for
them gains nothing there. With `--pipeline`:

    {"variant": "pipeline_2", "seconds": 3.664, "tokens_per_second": 2235.8, "bubble": 0.114, ...}
    {"variant": "pipeline_1", "seconds": 5.051, "tokens_per_second": 1621.9, "bubble": 0.452, ...}
    {"ratio": "pipeline_1 to pipeline_2", "speedup": 1.38, ..., "same_responses": 1.0}

All variants answer the same questions, sums like the quickstart's, with the model of `--hf`: as it is, or as the
untrained student made from it (what it writes is noise, and costs what sense would cost). No token ends a response, so
each has exactly `--new-tokens` of them; with `--stop-at-end-tokens` they end as in training, for which `--hf` should be
a student that was trained, as `runs/quickstart/student_hf`. All is float32.

- `ours`: `RolloutEngine` with all prompts.
- `one_at_a_time`: the same engine, `rollout.batch_size` 1.
- `plain`: a static batch with `transformers`, as one would write it without an engine (`plain_sampler.py`).
- `teacher_autoregressive`: the model as it is, by our engine in blocks of one token, each predicted by the output
  before it: block-diffusion attention is causal then.

With `--pipeline` ours under two pipeline stages, processes of this machine: `pipeline_1` and `pipeline_2` have as many
`rollout.pipeline_micro_groups`, and `bubble` is the share of the stages' time spent waiting for each other.

`forwards_per_token` counts the forwards that a sequence takes part in beyond its prefill, `model_forwards_per_token`
those of the model per token of a sequence, prefill included; both count the tokens that fill up the last block too,
which `tokens_per_second` does not. `padding_waste` is the share of attention's query-key pairs that a mask hides, and
`query_tokens` went through the layers for a sequence that needed them. At temperature 0 variants of the student write
the same tokens; `same_responses` is the share of responses that are equal (rounding decides where two tokens, or two
confidences, are as good as equal).

Every variant runs in processes of its own, taking turns; a process warms up on a few prompts, then decodes all of them
`--repeats` times. `peak_mib` is the largest resident memory of the process, of the first stage in a pipeline;
`step_mib` is what decoding added.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_opdlm.observability.measurement import measure_in_process, peak_mib, ratio, summarise

if TYPE_CHECKING:
    from megatron_opdlm.rollout.statistics import RolloutStatistics

QUICKSTART_TEACHER = Path(__file__).parents[1] / "examples" / "quickstart" / "teacher"
ENGINE_SETTINGS = {
    "ours": {},
    "one_at_a_time": {"batch_size": 1},
    "teacher_autoregressive": {"block_size": 1, "denoising_steps_per_block": 1, "logit_shift": "next_token"},
    "pipeline_1": {"pipeline_micro_groups": 1},
    "pipeline_2": {"pipeline_micro_groups": 2},
}
"""Variant of our engine -> what its `rollout` settings change."""
VARIANTS = ("ours", "one_at_a_time", "plain", "teacher_autoregressive")
PIPELINE_VARIANTS = ("pipeline_2", "pipeline_1")
NUM_STAGES = 2
NUM_WARM_UP_PROMPTS = 2


@dataclass(frozen=True)
class Sizes:
    """What is decoded, and how."""

    num_prompts: int = 128
    new_tokens: int = 64
    block_size: int = 4
    denoising_steps: int = 4
    """Per block; one token per step if there are as many as positions."""
    max_terms: int = 4
    """A question has between two numbers and this many: more make prompts differ more in length."""
    temperature: float = 0.0
    stop_at_end_tokens: bool = False
    """Responses end there, as in training, and have `new_tokens` at most; otherwise all have as many."""


class Figures(NamedTuple):
    """What decoding took."""

    num_forwards: int
    """Of the model."""
    num_sequence_steps: int
    """Denoising steps, summed over the sequences."""
    num_query_tokens: int
    """Tokens of sequences that take part, through all forwards."""
    num_clean_tokens: int
    """Those of them that are read for the cache's sake: prefill and commits."""
    num_pairs: int
    """Query-key pairs of attention, per layer and head."""
    num_hidden_pairs: int
    """Those of them that a mask hides."""


class Decoded(NamedTuple):
    """The responses to all prompts."""

    responses: list[list[int]]
    """`Sizes.new_tokens` ids each, or fewer where end tokens count."""
    num_written: int
    """Tokens that were decoded, with those that fill up the last blocks."""
    figures: Figures
    bubble: float | None = None


Decoder = Callable[[list[list[int]]], Decoded]


def main() -> None:
    """Measures one variant in this process (`--once`) or all of them in processes of their own."""
    parser = _build_parser()
    arguments = parser.parse_args()
    sizes = Sizes(**{field.name: getattr(arguments, field.name) for field in fields(Sizes)})
    for rule, holds in _rules(sizes, arguments).items():
        if not holds:
            parser.error(rule)
    from megatron_opdlm.config.errors import user_errors

    with user_errors():
        if arguments.once:
            run = _measure_stages if arguments.variant in PIPELINE_VARIANTS else _measure_alone
            print(json.dumps(run(arguments.variant, sizes, arguments)))
            return
        measure_all(arguments)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Sizes):
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        if kind is bool:
            parser.add_argument(flag, action="store_true", help="responses end at an end token")
        else:
            parser.add_argument(flag, type=kind, default=field.default, help=f"default: {field.default}")
    parser.add_argument("--hf", default=str(QUICKSTART_TEACHER), help="folder of a Qwen3; default: the quickstart's")
    parser.add_argument("--pipeline", action="store_true", help="measure pipelines of two stages instead")
    parser.add_argument("--repeats", type=int, default=1, help="times that a process decodes all prompts")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each variant; the variants take turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads; default: all")
    parser.add_argument("--variant", choices=(*VARIANTS, *PIPELINE_VARIANTS), help="only this one")
    parser.add_argument("--once", action="store_true", help="measure --variant in this process")
    return parser


def _rules(sizes: Sizes, arguments: argparse.Namespace) -> dict[str, bool]:
    steps, size = sizes.denoising_steps, sizes.block_size
    counts = [sizes.num_prompts, sizes.new_tokens, steps, arguments.repeats, arguments.rounds, arguments.threads]
    return {
        "all sizes and counts must be at least 1": min(counts) >= 1,
        f"--denoising-steps ({steps}) must not exceed --block-size ({size})": steps <= size,
        f"--max-terms ({sizes.max_terms}) must be at least 2": sizes.max_terms >= 2,
        f"--temperature ({sizes.temperature}) must be at least 0": sizes.temperature >= 0,
        "--once measures one --variant, so name it": arguments.variant is not None or not arguments.once,
    }


def measure_all(arguments: argparse.Namespace) -> None:
    """Prints the line of every variant, and how each compares with the first."""
    variants = PIPELINE_VARIANTS if arguments.pipeline else VARIANTS
    variants = variants if arguments.variant is None else (arguments.variant,)
    rounds = [[_measure_in_process(variant) for variant in variants] for _ in range(arguments.rounds)]
    summaries = [summarise(runs) for runs in zip(*rounds, strict=True)]
    for summary in summaries:
        print(json.dumps(report(summary)), flush=True)
    for other in summaries[1:]:
        print(json.dumps(compare(summaries[0], other)), flush=True)


def _measure_in_process(variant: str) -> dict:
    """The measurement in a fresh process with this one's flags; of two equal flags the later one wins."""
    return measure_in_process(Path(__file__), [*sys.argv[1:], "--variant", variant, "--once"])


def _measure_alone(variant: str, sizes: Sizes, arguments: argparse.Namespace) -> dict:
    import torch

    torch.set_num_threads(arguments.threads)
    return measure(variant, sizes, arguments.repeats, arguments.hf)


def _measure_stages(variant: str, sizes: Sizes, arguments: argparse.Namespace) -> dict:
    """The first stage's measurement; each stage is a process with its share of the threads."""
    import torch.multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run_stage, (variant, sizes, arguments, folder), nprocs=NUM_STAGES)
        return json.loads(Path(folder, "line").read_text())


def _run_stage(stage: int, variant: str, sizes: Sizes, arguments: argparse.Namespace, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, arguments.threads // NUM_STAGES))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=stage, world_size=NUM_STAGES)
    line = measure(variant, sizes, arguments.repeats, arguments.hf)
    dist.destroy_process_group()
    if stage == 0:
        Path(folder, "line").write_text(json.dumps(line))


def measure(variant: str, sizes: Sizes, repeats: int, hf: str) -> dict:
    """Seconds of each timed run, memory in MiB, and what the last run wrote. A pipeline's stages must all call it."""
    import psutil

    prompts = make_prompts(hf, sizes)
    decode = build_plain(hf, sizes) if variant == "plain" else build_ours(hf, sizes, variant)
    before, seconds = psutil.Process().memory_info().rss / 2**20, []
    decode(prompts[:NUM_WARM_UP_PROMPTS])
    for _ in range(repeats):
        start = time.perf_counter()
        decoded = decode(prompts)
        seconds.append(time.perf_counter() - start)
    peak = peak_mib()
    return {
        **{"variant": variant, "seconds": seconds, "step_mib": peak - before, "peak_mib": peak},
        **decoded._asdict(),
        "figures": decoded.figures._asdict(),
        "prefill_tokens": prefill_tokens(prompts, 1 if variant == "teacher_autoregressive" else sizes.block_size),
    }


def prefill_tokens(prompts: list[list[int]], block_size: int) -> int:
    """Tokens of the whole blocks of the prompts."""
    return sum(len(prompt) // block_size * block_size for prompt in prompts)


def report(summary: dict) -> dict:
    """The line of a variant."""
    figures, num_sequences = Figures(**summary["figures"]), len(summary["responses"])
    num_tokens, written = sum(map(len, summary["responses"])), summary["num_written"]
    line = {
        **{name: summary[name] for name in ("variant", "seconds", "fastest_seconds")},
        "tokens_per_second": round(num_tokens / summary["seconds"], 1),
        "forwards_per_token": round(figures.num_sequence_steps / written, 4),
        "model_forwards_per_token": round(figures.num_forwards * num_sequences / written, 4),
        "ms_per_forward": round(1e3 * summary["seconds"] / figures.num_forwards, 3),
        "padding_waste": round(figures.num_hidden_pairs / figures.num_pairs, 4),
        "query_tokens": figures.num_query_tokens,
        **{name: summary[name] for name in ("prefill_tokens", "step_mib", "peak_mib")},
    }
    return line if summary["bubble"] is None else line | {"bubble": round(summary["bubble"], 3)}


def compare(ours: dict, other: dict) -> dict:
    """The line with the ratios; the teacher's responses are others."""
    line = {"ratio": f"{other['variant']} to {ours['variant']}", **ratio(ours, other)}
    if other["variant"] == "teacher_autoregressive":
        return line
    pairs = list(zip(ours["responses"], other["responses"], strict=True))
    return line | {"same_responses": round(sum(one == another for one, another in pairs) / len(pairs), 4)}


def make_prompts(hf: str, sizes: Sizes) -> list[list[int]]:
    """The ids of sums to solve, always the same ones. Numbers of any length let them end anywhere in a block."""
    from megatron_opdlm.data.tokenizer import load_tokenizer

    tokenizer, draw, prompts = load_tokenizer(hf), random.Random(0), []
    for _ in range(sizes.num_prompts):
        numbers = [str(draw.randrange(10 ** draw.randint(1, 3))) for _ in range(draw.randint(2, sizes.max_terms))]
        question = f"State the final answer to the following arithmetic problem: {' + '.join(numbers)} ="
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return prompts


# --- ours -------------------------------------------------------------------------------------------------------------


def build_ours(hf: str, sizes: Sizes, variant: str) -> Decoder:
    """The engine with the student, or with the teacher under the student's attention in blocks of one token."""
    from megatron_opdlm.checkpointing.student_and_teacher import build_student, open_student, padded_vocab_size
    from megatron_opdlm.config.schema import (
        AttentionConfig,
        Config,
        ParallelConfig,
        PrecisionConfig,
        RolloutConfig,
        StudentConfig,
    )
    from megatron_opdlm.data.prompts import Prompt
    from megatron_opdlm.parallel.initialize import initialize
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    settings = {"block_size": sizes.block_size, "denoising_steps_per_block": sizes.denoising_steps}
    settings |= {"batch_size": sizes.num_prompts, "temperature": sizes.temperature} | ENGINE_SETTINGS[variant]
    config = Config(
        student=StudentConfig(hf=hf),
        parallel=ParallelConfig(pipeline_model_parallel_size=NUM_STAGES if variant in PIPELINE_VARIANTS else 1),
        precision=PrecisionConfig(dtype="float32"),
        attention=AttentionConfig(backend="dense"),  # of training; decoding has its own
        rollout=RolloutConfig(remasking_strategy="low_confidence_static", **settings),
    )
    groups, source = initialize(config.parallel, seed=0), open_student(config.student)
    model = build_student(source, config, groups, padded_vocab_size(config, source.architecture))
    special = source.special if sizes.stop_at_end_tokens else replace(source.special, end_token_ids=())
    engine = RolloutEngine(model, config.rollout, special, seed=0)

    def decode(prompts: list[list[int]]) -> Decoded:
        tasks = [RolloutTask(Prompt(place, tuple(ids)), sizes.new_tokens) for place, ids in enumerate(prompts)]
        trajectories = engine.generate(tasks, step=0)
        return Decoded(
            responses=[trajectory.response_ids.tolist() for trajectory in trajectories],
            num_written=sum(len(trajectory.step_map_R) for trajectory in trajectories),
            figures=read_figures(engine.statistics),
            bubble=engine.statistics.pipeline_bubble,
        )

    return decode


def read_figures(statistics: RolloutStatistics) -> Figures:
    """Of a rollout."""
    return Figures(**{name: getattr(statistics, name) for name in Figures._fields})


# --- plain ------------------------------------------------------------------------------------------------------------


def build_plain(hf: str, sizes: Sizes) -> Decoder:
    """The sampler with the weights of the folder, whose embedding must have a row for the mask token."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from megatron_opdlm.config.schema import StudentConfig
    from megatron_opdlm.data.tokenizer import add_mask_token, end_token_ids, load_tokenizer
    from tools.plain_sampler import PlainSampler

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="sdpa").eval().to(device)
    tokenizer = load_tokenizer(hf)
    mask_token_id = add_mask_token(tokenizer, StudentConfig().mask_token)
    if mask_token_id >= model.config.vocab_size:
        raise ValueError(f"--hf ({hf}) must have a row for the mask token, id {mask_token_id}, in its embedding")
    settings = {
        "mask_token_id": mask_token_id,
        "block_size": sizes.block_size,
        "denoising_steps": sizes.denoising_steps,
        "new_tokens": sizes.new_tokens,
        "temperature": sizes.temperature,
        "end_token_ids": end_token_ids(tokenizer, hf) if sizes.stop_at_end_tokens else (),
    }

    def decode(prompts: list[list[int]]) -> Decoded:
        sampler = PlainSampler(model, prompts, **settings)
        responses = sampler.decode()
        return Decoded(responses, sampler.num_written, Figures(**sampler.counts))

    return decode


if __name__ == "__main__":
    main()
