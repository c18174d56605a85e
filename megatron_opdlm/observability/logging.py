"""One set-up of Python's logging for all ranks: rank 0 tells what happens, the others only what goes wrong.

set_up_logging()                                # once, in the entry point
logger = logging.getLogger(__name__)            # in every module
logger.info("128 prompts / 8 data-parallel ranks = 16 per rank")
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings

LIBRARY_WARNINGS = (
    r"The \.grad attribute of a Tensor that is not a leaf",  # Megatron's optimizer, once per rank
    r"`torch\.distributed\.\w+` is deprecated",  # Megatron's calls of torch
    r"\w+ is experimental and still under active development",  # Megatron-Core 0.19's parts that it imports for itself
)
"""Warnings of libraries about their own calls, which nobody at the terminal can act on."""
LIBRARY_RECORDS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}
"""Logger -> how its records of that kind begin, at each model that Megatron-Core 0.19 builds."""


def set_up_logging(level: int = logging.INFO) -> None:
    """Sends the project's log records to stderr, of rank 0 from `level` on; torchrun's RANK says who that is.

    Calling it again is harmless.
    """
    rank = int(os.environ.get("RANK", "0"))
    logger = logging.getLogger("megatron_opdlm")
    logger.setLevel(level if rank == 0 else logging.WARNING)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"[rank {rank}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    for message in LIBRARY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, beginning in LIBRARY_RECORDS.items():
        logging.getLogger(name).addFilter(functools.partial(_begins_otherwise, beginning))


def _begins_otherwise(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)
