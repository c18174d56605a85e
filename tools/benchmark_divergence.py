"""Memory and time of the loss over the full vocabulary, against the same loss from all logits at once.

    python tools/benchmark_divergence.py

prints one JSON line per variant and one with their ratio, for example at `--positions 512 --vocab-size 20000
--hidden-size 256`:

    {"variant": "ours", "kind": "forward_kl", "seconds": 1.477, "extra_mib": 54.4, "with_gradients_mib": 74.5, ...}
    {"variant": "plain", "kind": "forward_kl", "seconds": 2.418, "extra_mib": 195.5, "with_gradients_mib": 215.6, ...}
    {"ratio": "plain to ours", "speedup": 1.64, "extra_memory_share": 0.278, "with_gradients_share": 0.346}

What is measured is one forward and backward from hidden states to the gradients of the student's hidden states and
output weight. Student and teacher have random weights of the same shape, and the figures are those of float32 on the
CPU.

- `ours` is `divergence_loss`, as a training run calls it.
- `plain` multiplies out the logits of all positions for both models, takes a log-softmax of each, and leaves the
  gradients to autograd. Nothing is kept that autograd does not need: the teacher runs without it.

What is counted, in MiB of 2^20 bytes:

- `with_gradients_mib`: the largest resident memory of the process during the pass minus what it held before, when
  hidden states and weights of both models were there and libraries had been loaded by a tiny pass;
- `weight_gradient_mib`, `hidden_gradient_mib`: the two gradients that are the result, V x H and N x H numbers. Where
  Megatron accumulates gradients it adds this one to the parameter's `main_grad`, which is there anyway, and frees it,
  so it is alive from the forward of a micro-batch to the end of its backward (under bfloat16, in float32, with a
  bfloat16 copy at the end). It is no extra where a framework without such buffers would keep it as the gradient;
- `extra_mib`: `with_gradients_mib` minus these two: what the loss needs beyond inputs, weights and their gradients.

Each variant runs in processes of its own. `--plain-gib` guards against running out of memory: `plain` is left out where
its estimate, five tensors of all logits, is above it.

Legend: `N` trained positions, `V` vocabulary, `H` hidden size.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from megatron_opdlm.config.method import DivergenceKind
from megatron_opdlm.config.schema import DivergenceConfig
from megatron_opdlm.observability.measurement import measure_in_process, peak_mib

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

VARIANTS = ("ours", "plain")
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """What the loss is computed of."""

    positions: int = 4096
    """Trained positions."""
    vocab_size: int = 151936
    """Rows of the output layer, all of which take part."""
    hidden_size: int = 1024
    """Of both models."""
    chunk_size: int | None = None
    """Of ours: `divergence.chunk_size`; by default the package's own."""

    @property
    def plain_gib(self) -> float:
        """Estimate for `plain`: logits and log-probabilities of the student, two of the teacher, one for gradients."""
        return 5 * 4 * self.positions * self.vocab_size / 2**30


WARM_UP = Sizes(positions=2, vocab_size=8, hidden_size=4)


def main() -> None:
    """Measures one variant in this process (`--once`) or both in processes of their own."""
    parser = _build_parser()
    arguments = parser.parse_args()
    sizes = Sizes(**{field.name: getattr(arguments, field.name) for field in fields(Sizes)})
    counts = [*asdict(sizes).values(), arguments.threads]
    if min(count for count in counts if count is not None) < 1:
        parser.error("all sizes and counts must be at least 1")
    if arguments.once:
        import torch

        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(arguments.variant, arguments.kind, sizes)))
        return
    variants = [arguments.variant] if arguments.variant else list(VARIANTS)
    if sizes.plain_gib > arguments.plain_gib and "plain" in variants:
        variants.remove("plain")
        print(f"plain is left out: about {sizes.plain_gib:.1f} GiB", file=sys.stderr)
    lines = [_measure_in_process(variant) for variant in variants]
    for line in [*lines, compare(*lines)] if len(lines) == 2 else lines:
        print(json.dumps(line), flush=True)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Sizes):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=int, default=field.default, help=f"default: {field.default}"
        )
    parser.add_argument("--kind", choices=get_args(DivergenceKind), default="forward_kl", help="default: forward_kl")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads; default: all")
    parser.add_argument("--plain-gib", type=float, default=14.0, help="run plain if it needs at most this; default: 14")
    parser.add_argument("--variant", choices=VARIANTS, help="only this one; default: both and their ratio")
    parser.add_argument("--once", action="store_true", help="measure --variant in this process")
    return parser


def _measure_in_process(variant: str) -> dict:
    """`measure` in a fresh process with this one's flags; of two equal flags the later one wins."""
    return measure_in_process(Path(__file__), [*sys.argv[1:], "--variant", variant, "--once"])


def measure(variant: str, kind: DivergenceKind, sizes: Sizes) -> dict:
    """Time, memory, and what was computed, so that it can be compared."""
    import psutil

    build = {"ours": _ours, "plain": _plain}[variant]
    build(kind, WARM_UP)(**random_inputs(WARM_UP)).backward()
    compute, inputs = build(kind, sizes), random_inputs(sizes)
    before, start = psutil.Process().memory_info().rss / MIB, time.perf_counter()
    loss = compute(**inputs)
    loss.backward()
    seconds, peak = time.perf_counter() - start, peak_mib()
    gradients = {name: inputs[f"student_{name}"].grad for name in ("weight_VH", "hidden_NH")}
    weight_mib, hidden_mib = (gradient.numel() * gradient.element_size() / MIB for gradient in gradients.values())
    return {
        "variant": variant,
        "kind": kind,
        **asdict(sizes),
        "seconds": round(seconds, 3),
        "extra_mib": round(peak - before - weight_mib - hidden_mib, 1),
        "with_gradients_mib": round(peak - before, 1),
        "weight_gradient_mib": round(weight_mib, 1),
        "hidden_gradient_mib": round(hidden_mib, 1),
        "loss": loss.item(),
        "gradient_norms": [gradient.norm().item() for gradient in gradients.values()],
    }


def compare(ours: dict, plain: dict) -> dict:
    """The line with the ratios."""
    return {
        "ratio": "plain to ours",
        "speedup": round(plain["seconds"] / ours["seconds"], 2),
        "extra_memory_share": round(ours["extra_mib"] / plain["extra_mib"], 3),
        "with_gradients_share": round(ours["with_gradients_mib"] / plain["with_gradients_mib"], 3),
    }


def random_inputs(sizes: Sizes) -> dict[str, torch.Tensor]:
    """Hidden states and output weights of both models, of a scale that gives logits of about unit variance."""
    import torch

    generator = torch.Generator().manual_seed(0)
    scale = sizes.hidden_size**-0.5
    inputs = {}
    for model in ("student", "teacher"):
        hidden_NH = torch.randn(sizes.positions, sizes.hidden_size, generator=generator)
        weight_VH = torch.randn(sizes.vocab_size, sizes.hidden_size, generator=generator).mul_(scale)
        inputs |= {f"{model}_hidden_NH": hidden_NH, f"{model}_weight_VH": weight_VH}
    return {name: x.requires_grad_(name.startswith("student")) for name, x in inputs.items()}


def _ours(kind: DivergenceKind, sizes: Sizes) -> Callable[..., torch.Tensor]:
    """The package's loss: the mean over positions."""
    import torch

    from megatron_opdlm.distillation.chunked_loss import divergence_loss
    from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard

    chunk = {} if sizes.chunk_size is None else {"chunk_size": sizes.chunk_size}
    settings = DivergenceConfig(kind=kind, **chunk)
    shard = VocabularyShard(0, sizes.vocab_size, sizes.vocab_size, mask_token_id=sizes.vocab_size, group=None)

    def loss(**inputs: torch.Tensor) -> torch.Tensor:
        num_positions = len(inputs["student_hidden_NH"])
        weights_N = torch.full((num_positions,), 1 / num_positions)
        targets_N = torch.zeros(num_positions, dtype=torch.int64)
        both = {"loss_weights_N": weights_N, "target_ids_N": targets_N}
        return divergence_loss(**inputs, **both, settings=settings, shard=shard).loss

    return loss


def _plain(kind: DivergenceKind, sizes: Sizes) -> Callable[..., torch.Tensor]:
    """All logits at once and autograd; the defaults of the settings where the kind has some."""
    import torch
    from torch.nn.functional import kl_div

    weight, alpha = DivergenceConfig().reverse_weight, DivergenceConfig().jsd_alpha

    def kl(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return kl_div(to, of, reduction="batchmean", log_target=True)

    def jsd(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        m = (alpha * p.exp() + (1 - alpha) * q.exp()).log()
        return alpha * kl(p, m) + (1 - alpha) * kl(q, m)

    divergence = {
        "forward_kl": kl,
        "reverse_kl": lambda p, q: kl(q, p),
        "mixture": lambda p, q: (1 - weight) * kl(p, q) + weight * kl(q, p),
        "jsd": jsd,
    }[kind]

    def loss(student_hidden_NH, student_weight_VH, teacher_hidden_NH, teacher_weight_VH) -> torch.Tensor:
        with torch.no_grad():
            log_p_NV = (teacher_hidden_NH @ teacher_weight_VH.t()).log_softmax(-1)
        log_q_NV = (student_hidden_NH @ student_weight_VH.t()).log_softmax(-1)
        return divergence(log_p_NV, log_q_NV)

    return loss


if __name__ == "__main__":
    main()
