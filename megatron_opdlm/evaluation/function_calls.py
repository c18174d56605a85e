"""Results of a function of unknown intent, called in the sandbox; they are compared outside, by whoever asks.

    call_function("def f(x): return x + 1", "f", [[41], [1]])    # [Returned(42, ...), Returned(2, ...)]
    call_function("import os; os._exit(0)", "f", [[41]])         # []

The right results never enter the sandbox, so nothing that runs there can pass for them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.evaluation.inside.values import decode, encode
from megatron_opdlm.evaluation.sandbox import Limits, run_program

INSIDE = Path(__file__).parent / "inside"
# For the interpreter's start and for reading the arguments, on top of the time of the calls.
START_SECONDS = 10.0


@dataclass(frozen=True)
class Returned:
    """What one call returned, and the seconds it took."""

    value: Any
    seconds: float


def call_function(
    source: str, entry: str, calls: Sequence[Sequence[Any]], *, seconds: Sequence[float], limits: Limits | None = None
) -> list[Returned]:
    """What a function, or a method of the class `Solution`, returns for each list of arguments.

    Calls are made in order by one process, up to the first that raises, exceeds its limit or ends the process: the
    list then ends before it.

    Args:
        source: the program.
        entry: name of the function.
        calls: arguments of each call, of the kinds that `inside.values` can write.
        seconds: limit of each call.
        limits: of all calls together; `limits.seconds` is what they have besides their own start.
    """
    limits = limits or Limits(seconds=sum(seconds) + START_SECONDS)
    job = {"source": source, "entry": entry, "calls": [encode(list(call)) for call in calls], "seconds": list(seconds)}
    outcome = run_program(_program(job), limits=limits)
    returned = []
    for line in outcome.stdout.split("\n")[: len(calls)]:
        answer = _read_line(line)
        if answer is None:
            break
        returned.append(answer)
    return returned


def _program(job: dict) -> str:
    """The caller's text, which a `from __future__` may begin only once, with the job at its end."""
    parts = [(INSIDE / name).read_text(encoding="utf-8") for name in ("values.py", "calls.py")]
    text = "\n".join(part.replace("from __future__ import annotations\n", "") for part in parts)
    return f"{text}\ncall_all(json.loads({json.dumps(job)!r}))\n"


def _read_line(line: str) -> Returned | None:
    """A line that `inside/calls.py`, or the program in its place, has written; None unless it says what came out."""
    try:
        answer = json.loads(line)
        return Returned(decode(answer["value"]), float(answer["seconds"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
