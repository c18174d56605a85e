"""The tables and plots of `megatron_opdlm/planning/README.md`.

    python tools/plan_scaling.py --output megatron_opdlm/planning

prints the tables and writes `cost_per_step.png` and `rollout_imbalance.png` there. All of it is predicted, from data
sheets and the assumed `Rates`; the quickstart's lengths alone are measured.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from megatron_opdlm.planning import scaling
from megatron_opdlm.planning.rates import Rates
from megatron_opdlm.planning.scaling import GPUS_OF_8B, SIZES, Scale, imbalance_of, prediction_of, table

PHASES = ("rollout", "teacher", "student", "optimizer")
LIMITS = (500, 1000, 2000, 4000, 8000, 16000)
NUM_DRAWS = 8


def main() -> None:
    """Prints the tables, draws the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the plots")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    sizes, gpus, lengths = of_sizes(), of_gpus(), of_lengths()
    for title, rows in (("model size", sizes), ("GPUs, Qwen3-8B", gpus), ("longest response, Qwen3-8B", lengths)):
        print(f"\n{title}\n\n{table(HEADER, [row for row, _ in rows])}")
    print(f"\nassumptions changed one by one, Qwen3-8B on 8 GPUs\n\n{table(*of_rates())}")
    imbalances = of_imbalance()
    print(f"\nrollout\n\n{table(IMBALANCE_HEADER, [row for row, _ in imbalances])}")
    draw_costs(sizes, gpus, lengths, arguments.output / "cost_per_step.png")
    draw_imbalance(imbalances, arguments.output / "rollout_imbalance.png")


HEADER = ("", "layout", "GPUs", "s/step", "of it rollout", "GPU-s per 1,000 tokens", "MFU %", "peak GiB", "bound by")


def _row(name: str, num_gpus: int, prediction, workload) -> tuple[list[str], tuple]:
    tokens = workload.num_responses * workload.response_tokens
    row = [
        name,
        prediction.layout.spelt(),
        str(num_gpus),
        f"{prediction.seconds:.1f}",
        f"{prediction.phases['rollout'].seconds:.1f}",
        f"{1000 * num_gpus * prediction.seconds / tokens:.2f}",
        f"{100 * prediction.mfu:.1f}",
        f"{prediction.peak / 2**30:.0f}",
        prediction.bound,
    ]
    return row, (name, [prediction.phases[phase].seconds for phase in PHASES])


def of_sizes() -> list:
    """Every published size on the GPUs of its recipe."""
    return [_row(name, num, *prediction_of(name, num, scale)) for name, (num, scale) in SIZES.items()]


def of_gpus() -> list:
    """The 8B on more and more GPUs."""
    rows = []
    for num, scale in GPUS_OF_8B:
        name = f"{scale.prompts} prompts, {scale.global_batch} an update"
        rows.append(_row(name, num, *prediction_of("qwen3-8b", num, scale)))
    return rows


def of_lengths() -> list:
    """The 8B on 8 GPUs under different limits of a response, whose mean keeps its share of the limit."""
    rows = []
    for limit in LIMITS:
        scale = Scale(tensor=4, recompute="full" if limit > 8000 else "none")
        rows.append(_row(str(limit), 8, *prediction_of("qwen3-8b", 8, scale, longest=limit)))
    return rows


def of_rates() -> tuple[list[str], list[list[str]]]:
    """What each assumption decides."""
    usual = Rates()
    changed = {
        "as assumed": (usual, {}),
        "linear layers at 45 % of the peak": (replace(usual, matmul=0.45), {}),
        "host 1 ms between forwards instead of 3": (replace(usual, host_seconds_per_forward=1e-3), {}),
        "host 10 ms between forwards": (replace(usual, host_seconds_per_forward=10e-3), {}),
        "a collective 5 µs at least instead of 15": (replace(usual, message_latency=5e-6), {}),
        "1 token a denoising step instead of 1.5": (usual, {"tokens_per_step": 1.0}),
        "3 tokens a denoising step": (usual, {"tokens_per_step": 3.0}),
        "responses of 2,000 tokens in the mean": (usual, {"response_tokens": 2000}),
        "lengths spread by 0.4 instead of 0.8": (usual, {"spread": 0.4}),
    }
    rows = []
    for name, (rates, lengths) in changed.items():
        prediction, _ = prediction_of("qwen3-8b", 8, Scale(tensor=4), rates, **lengths)
        seconds = [f"{prediction.phases[phase].seconds:.1f}" for phase in PHASES]
        rows.append([name, *seconds, f"{prediction.seconds:.1f}"])
    return ["", *PHASES, "all"], rows


IMBALANCE_HEADER = (
    "lengths",
    "tasks a rank",
    "slots",
    "plain batches",
    "own tasks",
    "shared",
    "idle, own",
    "idle, shared",
)


def of_imbalance() -> list:
    """16 ranks of four GPUs: seconds of a rollout with static batches, continuous batching, and shared work."""
    mean, num_ranks, rows = 1068, 16, []
    kinds = {
        "quickstart's, stretched": lambda num, seed: scaling.lengths_like_quickstart(num, mean, seed),
        "log-normal, spread 0.4": lambda num, seed: scaling.lengths_log_normal(num, mean, 0.4, seed),
        "log-normal, spread 0.8": lambda num, seed: scaling.lengths_log_normal(num, mean, 0.8, seed),
        "log-normal, spread 1.2": lambda num, seed: scaling.lengths_log_normal(num, mean, 1.2, seed),
    }
    for name, draw in kinds.items():
        for tasks, slots in ((8, 8), (32, 32), (32, 8), (128, 32)):
            ways = {
                way: [
                    imbalance_of(draw(num_ranks * tasks, seed), num_ranks=num_ranks, num_slots=slots, sharing=way)
                    for seed in range(NUM_DRAWS)
                ]
                for way in ("static", "own", "shared")
            }
            seconds = {way: fmean(finish.seconds for finish in found) for way, found in ways.items()}
            idle = {way: fmean(finish.idle_share for finish in found) for way, found in ways.items()}
            row = [name, str(tasks), str(slots), *(f"{seconds[way]:.1f} s" for way in ways)]
            row += [f"{100 * idle[way]:.0f} %" for way in ("own", "shared")]
            rows.append((row, (name, tasks, slots, seconds)))
    return rows


def draw_costs(sizes: list, gpus: list, lengths: list, path: Path) -> None:
    """Seconds of a step by phase, stacked: over sizes, GPUs and lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    names = [f"{row[2]} GPUs\n{row[0].split(' prompts')[0]} prompts" for row, _ in gpus]
    panels = (
        ("model, on its recipe's GPUs", [f"{row[0].removeprefix('qwen3-')}\n{row[2]}" for row, _ in sizes], sizes),
        ("Qwen3-8B", names, gpus),
        ("Qwen3-8B on 8 GPUs, longest response", [row[0] for row, _ in lengths], lengths),
    )
    for axes, (title, labels, rows) in zip(figure.subplots(1, 3), panels, strict=True):
        bottom = [0.0] * len(rows)
        for place, phase in enumerate(PHASES):
            heights = [seconds[place] for _, (_, seconds) in rows]
            axes.bar(labels, heights, bottom=bottom, label=phase)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.set(title=title, ylabel="predicted seconds of a step")
        axes.tick_params(axis="x", labelsize=8)
    axes.legend(frameon=False)
    figure.suptitle("Predicted, not measured: H100 80GB")
    figure.savefig(path, dpi=110)


def draw_imbalance(rows: list, path: Path) -> None:
    """Seconds of a rollout by the way that tasks are shared, one panel for each number of tasks and slots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4), layout="constrained")
    cases = list(dict.fromkeys((tasks, slots) for _, (_, tasks, slots, _) in rows))
    ways = {"static": "plain batches", "own": "continuous, own tasks", "shared": "continuous, shared"}
    for axes, case in zip(figure.subplots(1, len(cases)), cases, strict=True):
        of_case = [line for _, line in rows if line[1:3] == case]
        for place, (way, label) in enumerate(ways.items()):
            where = [index + 0.27 * (place - 1) for index in range(len(of_case))]
            axes.bar(where, [line[3][way] for line in of_case], width=0.25, label=label)
        labels = [line[0].replace(", ", "\n").replace("log-normal", "log-n.") for line in of_case]
        axes.set_xticks(range(len(of_case)), labels, fontsize=7)
        axes.set(title=f"{case[0]} tasks a rank, {case[1]} slots", ylabel="simulated seconds")
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle("Rollout of 16 ranks, simulated with predicted seconds of a forward: Qwen3-8B, TP4, H100")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
