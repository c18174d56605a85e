"""Mathematical answers checked in a process of its own, which is ended and started again when a check takes too long.

Why a process: comparing expressions can hang inside one big-integer operation, which no signal interrupts, and can take
all memory. math-verify limits its time by SIGALRM, which works in a main thread only, so not in a pool of threads. The
process has a main thread, a memory limit, and a parent that does not wait for it longer than `limit_s`.

Example:

    checker = MathProcess()
    checker.check("42", "It is \\\\boxed{42}.").is_correct     # True
    checker.close()

It starts with the first check (seconds: sympy is imported), serves one check at a time, from any thread, and ends with
its parent. One line of JSON goes in and one comes out per check.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from functools import cache

from megatron_opdlm.evaluation.answers import math_answers
from megatron_opdlm.evaluation.answers.math_answers import MathVerdict

logger = logging.getLogger(__name__)

START_LIMIT_S = 120.0
"""Seconds until the process must be ready; importing sympy from a shared file system is slow."""


class MathProcess:
    """Checks answers in another process.

    Args:
        limit_s: seconds that a check may take; past it the process is ended and the answer counts as wrong.
    """

    def __init__(self, limit_s: float = 20.0):
        self.limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def check(self, right_answer: str, text: str) -> MathVerdict:
        """`math_answers.check_math`, with the limits; wrong and without an answer when they are passed.

        Raises:
            ValueError: if math-verify is not installed.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._stop()  # somebody ended it between two checks
            process = self._process or self._start()
            line = self._exchange(process, json.dumps([str(right_answer), text]), self.limit_s)
            if line is None:
                logger.warning("checking an answer took more than %g s, or its memory: counted as wrong", self.limit_s)
                self._stop()
                return MathVerdict(is_correct=False, answer=None)
            return MathVerdict(**json.loads(line))

    def close(self) -> None:
        """Ends the process, if there is one."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError('checking mathematical answers needs math-verify: pip install "math-verify[antlr4_13_2]"')
        # by its path, and without its folder among those of modules: nothing of this package is imported
        program = [sys.executable, "-P", math_answers.__file__]
        process = self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._exchange(process, json.dumps(["1", "1"]), START_LIMIT_S) is None:
            self._stop()
            raise RuntimeError("the process that checks mathematical answers did not start; its message is above")
        return process

    def _exchange(self, process: subprocess.Popen[bytes], line: str, limit_s: float) -> bytes | None:
        """Sends a line and returns the next one, or None if there is none in time."""
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        deadline, answer = time.monotonic() + limit_s, b""
        while not answer.endswith(b"\n"):
            readable = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
            part = os.read(process.stdout.fileno(), 65536) if readable else b""
            if not part:
                return None
            answer += part
        return answer

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@cache
def shared_math_process() -> MathProcess:
    """The one process that all tasks of this program use."""
    return MathProcess()
