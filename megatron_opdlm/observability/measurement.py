"""What the benchmarks share: a measurement in a process of its own, its peak memory, rounds as one, a plot.

line = measure_in_process(Path("tools/benchmark_train_step.py"), ["--variant", "ours", "--once"])
line["peak_mib"] = peak_mib()
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def measure_in_process(script: Path, arguments: Sequence[str]) -> dict:
    """The last line that the script prints, which is JSON. The caller stays small: a child inherits its peak.

    Raises:
        subprocess.CalledProcessError: the process failed; its message has gone to standard error.
    """
    command = [sys.executable, str(script), *arguments]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def peak_mib() -> float:
    """Largest resident memory of this process so far; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def summarise(runs: Sequence[dict]) -> dict:
    """Several processes of one variant as one: the median and the minimum of all `seconds`, the largest memory."""
    seconds = [value for run in runs for value in run["seconds"]]
    memory = {name: round(max(run[name] for run in runs), 1) for name in ("step_mib", "peak_mib")}
    times = {"seconds": round(statistics.median(seconds), 6), "fastest_seconds": round(min(seconds), 6)}
    return runs[0] | times | memory


def ratio(ours: dict, reference: dict) -> dict:
    """How many times faster ours is than the reference, and its share of the reference's memory."""
    return {
        "speedup": round(reference["seconds"] / ours["seconds"], 2),
        "speedup_of_fastest": round(reference["fastest_seconds"] / ours["fastest_seconds"], 2),
        "step_memory_share": round(ours["step_mib"] / reference["step_mib"], 3),
        "peak_memory_share": round(ours["peak_mib"] / reference["peak_mib"], 3),
    }


def plot_results(
    lines: Sequence[dict], path: Path, panels: Mapping[str, Callable[[dict], float]], title: str, *, x: str, curve: str
) -> None:
    """Draws each panel's value over `x`, both axes logarithmic, one curve for each value of `curve`; a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    for axes, (name, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for label in dict.fromkeys(line[curve] for line in lines):
            own = [line for line in lines if line[curve] == label]
            axes.loglog([line[x] for line in own], [value(line) for line in own], marker="o", label=label, base=2)
        axes.set(title=name, xlabel=x)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
