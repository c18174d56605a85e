"""A plan in words and tables for the terminal, and as a mapping for `--json`.

print(render(config, prediction, gpu_name, workload))
print(render_search(found, num_shown=5))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_opdlm.config.schema import Config
from megatron_opdlm.planning.memory import GIB
from megatron_opdlm.planning.prediction import Prediction
from megatron_opdlm.planning.search import Search
from megatron_opdlm.planning.workload import Workload

LABEL = "prediction from data sheets and assumed rates, not measured on GPUs"


def as_mapping(config: Config, prediction: Prediction, workload: Workload) -> dict[str, Any]:
    """Everything of a plan, in GiB, seconds, operations and bytes."""
    fullest = max(prediction.memory, key=lambda plan: plan.peak)
    return {
        "kind": LABEL,
        "layout": prediction.layout.spelt(),
        "num_gpus": prediction.layout.num_ranks,
        "micro_batch_size": config.training.micro_batch_size,
        "recompute": config.training.recompute,
        "fits": prediction.peak <= prediction.budget,
        "budget_gib": prediction.budget / GIB,
        "peak_gib": {name: value / GIB for name, value in fullest.phases.items()},
        "parts_gib": {name: value / GIB for name, value in fullest.parts.items()},
        "cache_gib": fullest.cache_bytes(prediction.budget) / GIB,
        "seconds": prediction.seconds,
        "phases": {
            name: {
                "seconds": phase.seconds,
                "bound": phase.bound,
                "by_resource": phase.by_resource,
                "gigabytes_sent_by_a_rank": phase.num_bytes / 1e9,
            }
            for name, phase in prediction.phases.items()
        },
        "flops": vars(prediction.flops) | {"needed": prediction.flops.needed},
        "mfu": prediction.mfu,
        "bound": prediction.bound,
        "imbalance": prediction.imbalance,
        "sequences_decoded_together": prediction.num_decoded_together,
        "tokens_per_second": prediction.tokens_per_second,
        "workload": vars(workload),
    }


def render(config: Config, prediction: Prediction, gpu_name: str, workload: Workload) -> str:
    """The plan of one layout."""
    fullest = max(prediction.memory, key=lambda plan: plan.peak)
    fits = "fits" if prediction.peak <= prediction.budget else "DOES NOT FIT"
    training = config.training
    head = (
        f"{prediction.layout.spelt()} on {prediction.layout.num_ranks} x {gpu_name}, micro-batch "
        f"{training.micro_batch_size}, recompute {training.recompute}: {fits}\n"
        f"({LABEL})\n\n"
        f"a step: {workload.num_responses} responses of {workload.response_tokens:.0f} tokens in the mean, "
        f"{workload.longest_response} at most, behind prompts of {workload.prompt_tokens}; "
        f"{workload.tokens_per_step:g} tokens a denoising step\n"
    )
    parts = [(name, f"{value / GIB:.2f}") for name, value in fullest.parts.items() if value]
    parts += [(f"peak of {name}", f"{value / GIB:.2f}") for name, value in fullest.phases.items()]
    parts += [("budget", f"{prediction.budget / GIB:.2f}")]
    phases = [
        (name, f"{phase.seconds:.1f}", phase.bound, f"{_flops(prediction, name):.3g}", f"{phase.num_bytes / 1e9:.3g}")
        for name, phase in prediction.phases.items()
    ]
    phases.append(("all", f"{prediction.seconds:.1f}", prediction.bound, f"{prediction.flops.needed:.3g}", ""))
    end = (
        f"MFU {100 * prediction.mfu:.1f} %, {prediction.tokens_per_second:.0f} response tokens/s, "
        f"{prediction.num_decoded_together} sequences decoded together on a rank, busiest rank of a global batch "
        f"{prediction.imbalance:.2f} of the mean"
    )
    return "\n".join(
        [
            head,
            columns(("memory of the fullest rank", "GiB"), parts),
            "",
            columns(("phase", "seconds", "bound by", "FLOPs of all", "GB sent by a rank"), phases),
            "",
            end,
        ]
    )


def _flops(prediction: Prediction, phase: str) -> float:
    return getattr(prediction.flops, phase, 0.0) if phase != "optimizer" else 0.0


def render_search(found: Search, num_shown: int) -> str:
    """The fastest layouts that fit, the closest that do not, and the rules that refuse others."""
    rows = [
        (
            candidate.prediction.layout.spelt(),
            str(candidate.config.training.micro_batch_size),
            candidate.config.training.recompute,
            f"{candidate.prediction.seconds:.1f}",
            f"{candidate.prediction.phases['rollout'].seconds:.1f}" if "rollout" in candidate.prediction.phases else "",
            f"{100 * candidate.prediction.mfu:.1f}",
            f"{candidate.prediction.peak / GIB:.1f}",
            candidate.prediction.bound,
        )
        for candidate in found.fitting[:num_shown]
    ]
    header = ("layout", "micro-batch", "recompute", "s/step", "rollout", "MFU %", "peak GiB", "bound")
    lines = [f"the fastest of {len(found.fitting)} layouts that fit ({LABEL}):", columns(header, rows)]
    if found.misfits:
        lines += ["", f"the closest of {len(found.misfits)} that do not fit:"]
        lines.append(
            columns(
                ("layout", "micro-batch", "recompute", "why"),
                [
                    (
                        one.layout.spelt(),
                        str(one.config.training.micro_batch_size),
                        one.config.training.recompute,
                        one.reason,
                    )
                    for one in found.misfits[:num_shown]
                ],
            )
        )
    if found.refused:
        lines += ["", "refused by the rules of a run:"]
        lines += [f"  {number:5d}  {rule}" for rule, number in found.refused.most_common(num_shown)]
    return "\n".join(lines)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown that is also easy on the eyes."""
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
