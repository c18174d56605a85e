"""Calls a function of a program again and again, and prints one JSON line for each call: its result and its time.

    call_all({"source": "def f(x): return x + 1", "entry": "f", "calls": [[41]], "seconds": [1.0]})
    # {"value": 42, "seconds": 1.2e-06}

Runs inside, in the same process as a program that may do anything to it. So it knows no expected results, and the lines
say what came out, not whether it is right: a program can make it say wrong things, but not the right ones without
having them. `values.encode` stands before this text in the same program.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time


class _OutOfTime(BaseException):
    """A call that takes longer than its limit; not an Exception, which a program might catch by habit."""


class _Nowhere(io.TextIOBase):
    """Takes what the program prints."""

    def write(self, text: str) -> int:
        return len(text)


def call_all(job: dict) -> None:
    """Makes the calls in order, up to the first that fails, and ends the process."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout, sys.stderr, sys.stdin = _Nowhere(), _Nowhere(), io.StringIO()
    signal.signal(signal.SIGALRM, _stop)
    try:
        function = _find(job["source"], job["entry"])
    except BaseException as error:
        _finish(lines, {"error": f"{type(error).__name__}: {error}"})
    for arguments, seconds in zip(job["calls"], job["seconds"], strict=True):
        answer = _call(function, decode(arguments), seconds)  # noqa: F821  of values.py
        if "value" not in answer:
            _finish(lines, answer)
        lines.write(json.dumps(answer) + "\n")
        lines.flush()
    _finish(lines, None)


def _stop(number, frame) -> None:
    raise _OutOfTime


def _find(source: str, entry: str):
    """The function of that name, or the method of that name of an instance of the program's class `Solution`."""
    names = {"__name__": "solution"}
    exec(compile(source, "solution.py", "exec", dont_inherit=True), names)
    if entry not in names and "Solution" in names:
        return getattr(names["Solution"](), entry)
    return names[entry]


def _call(function, arguments: list, seconds: float) -> dict:
    """What came of one call. Programs raise whatever they like, so everything is caught."""
    start = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        value = function(*arguments)
        taken = time.perf_counter() - start
        form = encode(value)  # noqa: F821  within the limit, because a series may have no end
        signal.setitimer(signal.ITIMER_REAL, 0)
    except _OutOfTime:
        return {"time": True}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"value": form, "seconds": taken}


def _finish(lines, answer: dict | None) -> None:
    if answer is not None:
        lines.write(json.dumps(answer) + "\n")
    lines.flush()
    os._exit(0)  # without waiting for threads that the program has left
