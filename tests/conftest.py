"""What holds for all tests: one thread, reproducible examples, and GPU tests that are counted where they cannot run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
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


@pytest.fixture(scope="module")
def world_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The process of the tests as the only rank of a gloo world, while the tests of a module last."""
    rendezvous: Path = tmp_path_factory.mktemp("world") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def logging_as_imported() -> None:
    """`caplog` sees what the package logs, although a test before this one called `set_up_logging`."""
    logger = logging.getLogger("megatron_opdlm")
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    logger.handlers = []
