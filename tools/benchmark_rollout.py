"""Tokens per second of the rollout, against one sequence at a time, a plain sampler and autoregressive decoding.

    python tools/benchmark_rollout.py

prints one JSON line per variant and one per variant with the ratio of its time to that of ours. On two cores of an
Intel Xeon at 2.5 GHz, torch 2.13.0, November 2026, shortened:

    {"variant": "ours", "seconds": 1.884, "tokens_per_second": 4348.7, "forwards_per_token": 1.0, ...}
    {"variant": "ours_on_ranks", "seconds": 1.775, "tokens_per_second": 4615.2, "forwards_per_token": 1.0, ...}
    {"variant": "one_at_a_time", "seconds": 129.0, "tokens_per_second": 63.5, "model_forwards_per_token": 128.0, ...}
    {"variant": "plain", "seconds": 3.005, "tokens_per_second": 2726.1, "forwards_per_token": 1.2399, ...}
    {"variant": "plain_on_ranks", "seconds": 2.593, "tokens_per_second": 3159.2, "forwards_per_token": 1.2399, ...}
    {"variant": "teacher_autoregressive", "seconds": 2.264, "tokens_per_second": 3619.1, "forwards_per_token": 1.0, ...}
    {"ratio": "plain to ours", "speedup": 1.6, ..., "same_responses": 1.0}

A CPU's time goes with the tokens, of which the plain sampler reads as many; what it loses is mostly the cache that it
writes anew in every step, and so more on a machine whose memory is busy. Where both took turns, the median of a dozen
pairs lay between 1.53 and 1.63; single pairs scatter from 1.4 to 1.8.

With `--pipeline`:

    {"variant": "pipeline_2", "seconds": 3.664, "tokens_per_second": 2235.8, "bubble": 0.114, ...}
    {"variant": "pipeline_1", "seconds": 5.051, "tokens_per_second": 1621.9, "bubble": 0.452, ...}
    {"ratio": "pipeline_1 to pipeline_2", "speedup": 1.38, ..., "same_responses": 1.0}

All variants answer the same questions, sums like the quickstart's, with the model of `--hf`: as it is, or as the
untrained student made from it (what it writes is noise, and costs what sense would cost). No token ends a response, so
each has exactly `--new-tokens` of them; with `--stop-at-end-tokens` they end as in training, for which `--hf` should be
a student that was trained, as `runs/quickstart/student_hf`. All is float32.

- `ours`: `RolloutEngine` with all prompts, in one process with all threads.
- `ours_on_ranks`: the same in as many data-parallel processes as `--threads`, as `torchrun` starts them on CPU cores.
- `one_at_a_time`: the same engine, `rollout.batch_size` 1.
- `plain`: a static batch with `transformers`, as one would write it without an engine (`plain_sampler.py`).
- `plain_on_ranks`: a process for each thread, with its part of the prompts.
- `teacher_autoregressive`: the model as it is, by our engine in blocks of one token, each predicted by the output
  before it: block-diffusion attention is causal then.

With `--pipeline` ours under two pipeline stages, processes of this machine: `pipeline_1` and `pipeline_2` have as many
`rollout.pipeline_micro_groups`, and `bubble` is the share of the stages' time spent waiting for each other.

`forwards_per_token` counts the forwards that a sequence takes part in beyond its prefill, `model_forwards_per_token`
those of the model per token of a sequence, prefill included; both count the tokens that fill up the last block too,
which `tokens_per_second` does not. `padding_waste` is the share of attention's query-key pairs that a mask hides; ours
fills keys up to multiples of 16 on purpose, since kernels take longer without. `query_tokens` went through the layers
for a sequence that needed them. At temperature 0 variants of the student write
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
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

from megatron_opdlm.observability.measurement import measure_in_process, peak_mib, ratio, summarise
from tools.rollout_variants import (
    NUM_STAGES,
    PIPELINE_VARIANTS,
    Decoded,
    Figures,
    Sizes,
    build_ours,
    build_plain,
    make_prompts,
)

QUICKSTART_TEACHER = Path(__file__).parents[1] / "examples" / "quickstart" / "teacher"
VARIANTS = ("ours", "ours_on_ranks", "one_at_a_time", "plain", "plain_on_ranks", "teacher_autoregressive")
NUM_WARM_UP_PROMPTS = 2


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
            print(json.dumps(_measure_on_ranks(arguments.variant, sizes, arguments)))
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


def num_ranks(variant: str, threads: int) -> int:
    """Processes that a variant runs in; they share the threads."""
    if variant in PIPELINE_VARIANTS:
        return NUM_STAGES
    return threads if variant.endswith("_on_ranks") else 1


def _measure_on_ranks(variant: str, sizes: Sizes, arguments: argparse.Namespace) -> dict:
    """The line of the first rank, which has what all have decoded."""
    import torch.multiprocessing

    ranks = num_ranks(variant, arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if ranks == 1:
            _run_rank(0, 1, variant, sizes, arguments, folder)
        else:
            torch.multiprocessing.spawn(_run_rank, (ranks, variant, sizes, arguments, folder), nprocs=ranks)
        return json.loads(Path(folder, "line").read_text())


def _run_rank(rank: int, ranks: int, variant: str, sizes: Sizes, arguments: argparse.Namespace, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, arguments.threads // ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    line = measure(variant, sizes, arguments.repeats, arguments.hf)
    dist.destroy_process_group()
    if rank == 0:
        Path(folder, "line").write_text(json.dumps(line))


def measure(variant: str, sizes: Sizes, repeats: int, hf: str) -> dict:
    """Seconds of each timed run, memory in MiB, and what the last run wrote. All ranks of a variant must call it."""
    import psutil

    prompts = make_prompts(hf, sizes)
    decode = build_plain(hf, sizes) if variant.startswith("plain") else build_ours(hf, sizes, variant)
    before, seconds = psutil.Process().memory_info().rss / 2**20, []
    decode(prompts[:NUM_WARM_UP_PROMPTS])
    for _ in range(repeats):
        _wait_for_ranks(variant)
        start = time.perf_counter()
        decoded = decode(prompts)
        _wait_for_ranks(variant)
        seconds.append(time.perf_counter() - start)
    decoded, peak = _of_all_ranks(decoded, variant), peak_mib()
    return {
        **{"variant": variant, "seconds": seconds, "step_mib": peak - before, "peak_mib": peak},
        **decoded._asdict(),
        "figures": decoded.figures._asdict(),
        "prefill_tokens": prefill_tokens(prompts, 1 if variant == "teacher_autoregressive" else sizes.block_size),
    }


def _wait_for_ranks(variant: str) -> None:
    import torch.distributed as dist

    if variant.endswith("_on_ranks"):
        dist.barrier()


def _of_all_ranks(decoded: Decoded, variant: str) -> Decoded:
    """The responses of ranks that shared the prompts out; counts are added up, but forwards run side by side."""
    import torch.distributed as dist

    if not variant.endswith("_on_ranks"):
        return decoded
    parts: list[Decoded] = [decoded] * dist.get_world_size()
    dist.all_gather_object(parts, decoded)
    responses = [[]] * sum(len(part.responses) for part in parts)
    for place, part in enumerate(parts):
        responses[place :: len(parts)] = part.responses
    figures = Figures(*map(sum, zip(*(part.figures for part in parts), strict=True)))
    figures = figures._replace(num_forwards=max(part.figures.num_forwards for part in parts))
    return Decoded(responses, sum(part.num_written for part in parts), figures)


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


if __name__ == "__main__":
    main()
