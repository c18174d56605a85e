"""What holds for all tests: one thread, reproducible examples, and GPU tests that are counted where they cannot run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

NO_GPU = "no CUDA device"

torch.set_num_threads(1)
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/gpu, or marked `gpu`, is skipped without a GPU."""
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many GPU tests did not run, so that a green suite does not look like more than it is."""
    if not torch.cuda.is_available():
        skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_GPU in str(report.longrepr)]
        terminalreporter.write_line(f"gpu tests: {len(skipped)} skipped ({NO_GPU})")
