"""How an error reaches the person at the terminal.

    def main() -> None:
        with user_errors():
            config = load_config(required=("student", "teacher", "data.train_files"))
            ...

A ValueError speaks to users, so it ends the program with one line and exit code 2, the code of a wrong command line.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType

OUR_MODULES = ("megatron_opdlm", "tools", "__main__")


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns a ValueError into `error: <message>` on stderr and exit code 2.

    Raised in another library it may be a defect of ours: the traceback is then printed above that line.
    """
    try:
        yield
    except ValueError as error:
        if not _is_ours(error.__traceback__):
            traceback.print_exc()
        print(f"{_rank_prefix()}error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)


def _is_ours(trace: TracebackType) -> bool:
    """Whether the function that raised belongs to this project."""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in OUR_MODULES


def _rank_prefix() -> str:
    """Several ranks write to one terminal; each says who it is."""
    return f"[rank {os.environ['RANK']}] " if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
