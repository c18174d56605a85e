"""Time, memory and error of block-diffusion attention, backend by backend: one layer, forward and backward.

    python tools/benchmark_attention.py --backends aten sdpa --seq 1024 2048 --block-size 4 --output runs/attention

prints one JSON line per backend and length, then one per length with the ratio of the last backend to each other one:

    {"backend": "aten", "seq": 2048, "forward_ms": 201.4, "backward_ms": 446.0, "tflops": 0.32, "step_mib": 121.9, ...}
    {"ratio": "sdpa to aten", "seq": 2048, "speedup": 2.93, "step_memory_share": 0.31, ...}

and, with `--output`, keeps them in `attention.jsonl` beside a plot, `attention.png`. A backend is a name of
`attention.backend`, with a kernel or `fp8` after a colon where there is a choice: `aten:fa2`, `aten:cudnn`,
`flex:triton`, `te:fp8`. Two more names measure something to compare with:

- `sdpa`: PyTorch's scaled_dot_product_attention over the doubled sequence under the whole boolean mask.
- `causal`: plain causal attention with twice the query heads, which is what the decomposition asks of its kernel;
  what a backend takes longer is the in-block part. It computes something else, so it has no error.

`tflops` counts the multiplications and additions of the pattern's query-key pairs, the backward as two and a half
forwards, so that all backends are held against the same work. `floor_ms` is what a known GPU needs for them at its
peak, or for moving inputs, outputs and gradients once if that is longer. `step_mib` is the memory that forward and
backward add to the inputs. Errors are relative root mean squares against the dense pattern in float64 on the same
inputs, the largest over outputs and over gradients, up to `--check-up-to` positions.

Every measurement has a process of its own; backends take turns. On a GPU times are of CUDA events.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opdlm.observability.measurement import measure_in_process, peak_mib, plot_results, ratio, summarise
from megatron_opdlm.observability.throughput import block_causal_pairs, roofline_seconds

if TYPE_CHECKING:
    import torch

    from megatron_opdlm.models.attention.backend import Pair, Streams

REFERENCES = ("sdpa", "causal")
WARM_UPS = 3
"""Calls before the timed ones: compilation, and two rounds of history for FP8's delayed scales."""


@dataclass(frozen=True)
class Sizes:
    """One layer's attention."""

    block_size: int = 4
    batch: int = 1
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 128


def main() -> None:
    """Measures one backend at one length in this process (`--once`) or all of them in processes of their own."""
    parser = _build_parser()
    arguments = parser.parse_args()
    sizes = Sizes(**{field.name: getattr(arguments, field.name) for field in fields(Sizes)})
    for rule, holds in _rules(sizes, arguments).items():
        if not holds:
            parser.error(rule)
    from megatron_opdlm.config.errors import user_errors

    with user_errors():
        if arguments.once:
            (name,), (length,) = arguments.backends, arguments.seq
            print(json.dumps(measure(name, length, sizes, arguments)))
            return
        lines = measure_all(arguments)
        if arguments.output:
            write(lines, arguments.output)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["aten", "sdpa"], help="default: aten sdpa")
    parser.add_argument("--seq", nargs="+", type=int, default=[512, 1024, 2048], help="positions of one stream")
    for field in fields(Sizes):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=field.default, help=f"default: {field.default}")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of a process, after the warm-up")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each measurement; backends take turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads; default: all")
    parser.add_argument("--check-up-to", type=int, default=4096, help="longest sequence whose error is computed")
    parser.add_argument("--output", type=Path, help="folder for the lines and the plot")
    parser.add_argument("--once", action="store_true", help="measure the one backend and length in this process")
    return parser


def _rules(sizes: Sizes, arguments: argparse.Namespace) -> dict[str, bool]:
    counts = [*vars(sizes).values(), *arguments.seq, arguments.repeats, arguments.rounds, arguments.threads]
    return {
        "all sizes and counts must be at least 1": min(counts) >= 1,
        f"--heads ({sizes.heads}) must be a multiple of --kv-heads ({sizes.kv_heads})": sizes.heads % sizes.kv_heads
        == 0,
        f"--seq ({arguments.seq}) must be whole blocks of --block-size ({sizes.block_size})": not any(
            length % sizes.block_size for length in arguments.seq
        ),
        "--once takes one backend and one length": not arguments.once
        or len(arguments.backends) == len(arguments.seq) == 1,
    }


def measure_all(arguments: argparse.Namespace) -> list[dict]:
    """Prints and returns the lines of every length and backend."""
    lines = []
    for length in arguments.seq:
        rounds = [[_measure_in_process(name, length) for name in arguments.backends] for _ in range(arguments.rounds)]
        results = [summarise(runs) for runs in zip(*rounds, strict=True)]
        ratios = [
            {"ratio": f"{results[-1]['backend']} to {result['backend']}", "seq": length, **ratio(result, results[-1])}
            for result in results[:-1]
        ]
        for line in [*results, *ratios]:
            print(json.dumps(line), flush=True)
            lines.append(line)
    return lines


def _measure_in_process(name: str, length: int) -> dict:
    """`measure` in a fresh process with this one's flags; of two equal flags the later one wins."""
    which = ["--backends", name, "--seq", str(length), "--once"]
    return measure_in_process(Path(__file__), [*sys.argv[1:], *which])


# --- one measurement --------------------------------------------------------------------------------------------------


def measure(name: str, length: int, sizes: Sizes, arguments: argparse.Namespace) -> dict:
    """Milliseconds, work per second, memory and error of one backend at one length."""
    import torch

    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    attend = attention_of(name, sizes, dtype, device)
    streams, grads = make_inputs(length, sizes, dtype, device)
    before = _memory_mib(device)
    timings = time_calls(attend, streams, grads, WARM_UPS + arguments.repeats)[WARM_UPS:]
    peak = _peak_mib(device)
    forward, backward = (sorted(times)[len(times) // 2] for times in zip(*timings, strict=True))
    line = {
        **{"backend": name, "seq": length, **vars(sizes), "dtype": str(dtype).removeprefix("torch.")},
        **{"device": device_name(device), "seconds": [sum(pair) for pair in timings]},
        **{"forward_ms": round(forward * 1e3, 3), "backward_ms": round(backward * 1e3, 3)},
        **{"tflops": round(counted_flops(length, sizes) / (forward + backward) / 1e12, 3)},
        **{"floor_ms": floor_ms(length, sizes, device), "step_mib": peak - before, "peak_mib": peak},
    }
    if name != "causal" and length <= arguments.check_up_to:
        line |= errors(attend, streams, grads, sizes)
    return line


def attention_of(name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Callable[[Streams], Pair]:
    """The two outputs of a backend as a function of the streams. ValueError if the backend cannot do it here."""
    import torch

    from megatron_opdlm.models.attention.backend import AttentionCase, build_backend

    if name in REFERENCES:
        return {"sdpa": masked_sdpa, "causal": stacked_causal}[name](sizes)
    name, _, choice = name.partition(":")
    is_fp8 = choice == "fp8"
    case = AttentionCase(
        device_type=device.type,
        compute_capability=torch.cuda.get_device_capability() if device.type == "cuda" else None,
        dtype=dtype,
        head_dim=sizes.head_dim,
        kernel=choice if choice and not is_fp8 else "auto",
        fp8=is_fp8,
        fp8_recipe="delayed" if is_fp8 else "off",
    )
    layer = build_backend(name, case).for_layer(transformer_config(sizes), layer_number=1)

    @functools.cache
    def whole_lengths(length: int) -> torch.Tensor:
        # One tensor for all calls, as the layers of a micro-batch have: backends may know their masks by it.
        return torch.full((sizes.batch,), length, device=device)

    def attend(streams: Streams) -> Pair:
        lengths = whole_lengths(streams.query_clean.shape[1])
        with fp8_context(is_fp8):
            return layer.attend(streams, lengths=lengths, block_size=sizes.block_size, scale=sizes.head_dim**-0.5)

    return attend


def transformer_config(sizes: Sizes):
    """Megatron's configuration of one layer with this attention."""
    from megatron.core.transformer import TransformerConfig

    with warnings.catch_warnings(action="ignore"):  # of its own defaults for CUDA graphs
        return TransformerConfig(
            num_layers=1,
            hidden_size=sizes.heads * sizes.head_dim,
            num_attention_heads=sizes.heads,
            num_query_groups=sizes.kv_heads,
            kv_channels=sizes.head_dim,
            attention_dropout=0.0,
        )


def fp8_context(is_fp8: bool):
    """Transformer Engine's FP8 region with delayed scaling, attention included; or nothing."""
    if not is_fp8:
        from contextlib import nullcontext

        return nullcontext()
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    return te.fp8_autocast(enabled=True, fp8_recipe=DelayedScaling(fp8_dpa=True))


def masked_sdpa(sizes: Sizes) -> Callable[[Streams], Pair]:
    """PyTorch's attention over both streams at once, [B, 2S] positions, under the mask made once per length."""
    import torch

    from megatron_opdlm.diffusion.attention_pattern import block_diffusion_mask

    masks: dict[int, torch.Tensor] = {}

    def attend(streams: Streams) -> Pair:
        length, device = streams.query_clean.shape[1], streams.query_clean.device
        if length not in masks:
            lengths = torch.full((sizes.batch,), length, device=device)
            masks[length] = block_diffusion_mask(lengths, length, sizes.block_size)[:, None]
        pairs = zip(streams[:3], streams[3:], strict=True)
        query, key, value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs)
        # Repeated for each query head: under a mask, grouped heads would take PyTorch to its slowest kernel on a GPU.
        key, value = (x.repeat_interleave(sizes.heads // sizes.kv_heads, dim=1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=masks[length])
        return out.transpose(1, 2).chunk(2, dim=1)

    return attend


def stacked_causal(sizes: Sizes) -> Callable[[Streams], Pair]:
    """PyTorch's causal attention of both streams' queries, as heads, to the clean keys."""
    import torch

    def attend(streams: Streams) -> Pair:
        # Head h reads key-value head h // (2N / G) only if the heads are grouped first; the cost is the same.
        query = torch.cat((streams.query_clean, streams.query_noisy), dim=2).transpose(1, 2)
        key, value = streams.key_clean.transpose(1, 2), streams.value_clean.transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).chunk(2, dim=2)

    return attend


def make_inputs(
    length: int, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> tuple[Streams, list[torch.Tensor]]:
    """Normal queries, keys and values that want gradients, and gradients of the two outputs."""
    import torch

    from megatron_opdlm.models.attention.backend import Streams

    torch.manual_seed(0)
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    shapes = [(sizes.batch, length, count, sizes.head_dim) for count in (*heads, *heads, sizes.heads, sizes.heads)]
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    return Streams(*(x.requires_grad_() for x in tensors[:6])), tensors[6:]


def time_calls(
    attend: Callable[[Streams], Pair], streams: Streams, grads: Sequence[torch.Tensor], count: int
) -> list[tuple[float, float]]:
    """Seconds of each forward and of its backward. A GPU gets all calls in a row, so that it never waits for Python."""
    import torch

    on_gpu = streams.query_clean.device.type == "cuda"

    def mark():
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    calls = []
    for _ in range(count):
        start = mark()
        outs = attend(streams)
        middle = mark()
        torch.autograd.grad(outs, streams, grads, allow_unused=True)
        calls.append((start, middle, mark()))
        update_backward_scales()
    if not on_gpu:
        return [(middle - start, end - middle) for start, middle, end in calls]
    torch.cuda.synchronize()
    return [(start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3) for start, middle, end in calls]


def update_backward_scales() -> None:
    """What Transformer Engine's linear layers do behind a backward: without it FP8 gradients keep scales of one."""
    if module := sys.modules.get("transformer_engine.pytorch.quantization"):
        module.FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)


def errors(
    attend: Callable[[Streams], Pair], streams: Streams, grads: Sequence[torch.Tensor], sizes: Sizes
) -> dict[str, float]:
    """Relative root mean squares against the dense pattern in float64, one key-value group at a time."""
    import torch

    from megatron_opdlm.models.attention.backend import AttentionCase, Streams
    from megatron_opdlm.models.attention.dense import DenseAttention

    outs = attend(streams)
    actual = [x.detach().double() for x in (*outs, *torch.autograd.grad(outs, streams, grads))]
    squares = torch.zeros(2, len(actual), dtype=torch.float64)
    lengths = torch.full((1,), streams.query_clean.shape[1], device=streams.query_clean.device)
    dense = DenseAttention(AttentionCase(device_type=lengths.device.type, dtype=torch.float64))
    for row in range(sizes.batch):
        for group in range(sizes.kv_heads):

            def part(x: torch.Tensor, row: int = row, group: int = group) -> torch.Tensor:
                return x[row : row + 1].unflatten(2, (sizes.kv_heads, -1))[:, :, group]

            exact = Streams(*(part(x.detach()).double().requires_grad_() for x in streams))
            outs = dense.attend(exact, lengths=lengths, block_size=sizes.block_size, scale=sizes.head_dim**-0.5)
            expected = (*outs, *torch.autograd.grad(outs, exact, [part(x).double() for x in grads]))
            for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
                squares[0, i] += (part(ours) - theirs).square().sum().item()
                squares[1, i] += theirs.square().sum().item()
    relative = (squares[0] / squares[1]).sqrt()
    return {"out_error": float(f"{relative[:2].max():.3g}"), "grad_error": float(f"{relative[2:].max():.3g}")}


def counted_flops(length: int, sizes: Sizes) -> float:
    """Multiplications and additions of forward and backward over the query-key pairs of the pattern."""
    pairs = 2 * block_causal_pairs(length, sizes.block_size)  # as many for the noisy stream as for the clean one
    return 3.5 * 4 * sizes.head_dim * sizes.heads * sizes.batch * pairs


def counted_bytes(length: int, sizes: Sizes, bytes_per_number: int = 2) -> float:
    """Forward: inputs and outputs once. Backward: inputs, outputs and their gradients, and the inputs' gradients."""
    queries, keys = 2 * sizes.heads, 4 * sizes.kv_heads
    per_position = (queries + keys + queries) + (queries + keys + 2 * queries) + (queries + keys)
    return per_position * sizes.head_dim * length * sizes.batch * bytes_per_number


def floor_ms(length: int, sizes: Sizes, device: torch.device) -> float | None:
    """The longer of work and traffic at the GPU's peaks; None where these are not known."""
    seconds = roofline_seconds(device_name(device), counted_flops(length, sizes), counted_bytes(length, sizes))
    return None if seconds is None else round(seconds * 1e3, 4)


def device_name(device: torch.device) -> str:
    """Of the GPU, or `cpu`."""
    import torch

    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def _memory_mib(device: torch.device) -> float:
    import psutil
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


def _peak_mib(device: torch.device) -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_mib()


# --- the record -------------------------------------------------------------------------------------------------------


def write(lines: Sequence[dict], folder: Path) -> None:
    """`attention.jsonl` and `attention.png` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attention.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panels = {"forward and backward, ms": lambda x: x["seconds"] * 1e3, "added memory, MiB": lambda x: x["step_mib"]}
    title = "{device}, {dtype}, {heads} query and {kv_heads} key-value heads, blocks of {block_size}".format(**lines[0])
    results = [line for line in lines if "backend" in line]
    plot_results(results, folder / "attention.png", panels, title, x="seq", curve="backend")


if __name__ == "__main__":
    main()
