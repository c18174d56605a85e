"""Runs Python programs of unknown intent, shut off from the machine, from the network and from each other.

    check_isolation("strict")                              # ValueError unless everything is in force
    run_program("print(int(input()) + 1)", stdin="41")     # Outcome(verdict="ok", exit_code=0, stdout="42\\n", ...)
    run_program("while True: pass", limits=Limits(seconds=1)).verdict                   # "time"

There are two ways. With namespaces a program has a world of its own, where it may start processes and write small
files. Where the kernel or a container has none, it is shut in its own process: it may compute, read Python's files and
print. `isolation` finds out by trying, once, and says which; `inside/enter.py` does the shutting in.

Each program is started by exec, so this is safe beside torch and threads. Nothing it needs or writes lies on a disk, so
nothing is left behind; and all of it is killed when this process ends, however it ends.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

logger = logging.getLogger(__name__)

Verdict = Literal["ok", "error", "time", "memory", "output", "killed"]
Item, Result = TypeVar("Item"), TypeVar("Result")

ENTER = Path(__file__).parent / "inside" / "enter.py"
# What an interpreter needs of a Linux system, besides folders of its own.
SYSTEM_PATHS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")
# The process outside keeps the time; this is how much later it is given up, should it itself be stopped.
GRACE_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """Wall-clock time from its start, that of the interpreter included; also of each process's CPU time, and one more
    second."""
    memory_mib: int = 4096
    """Address space of each of its processes, the interpreter's included."""
    output_mib: int = 16
    """Of standard output, of standard error, and of each file."""
    processes: int = 8
    """Processes and threads at one time, with namespaces; otherwise there is one."""
    files: int = 64
    """Open at one time in each process."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a program.

    Example: Outcome(verdict="error", exit_code=1, stdout="", stderr="... ZeroDivisionError: division by zero\\n").
    """

    verdict: Verdict
    """`ok`: it ended with exit code 0. `memory` and `error`: another one, after a MemoryError or not. `time`, `output`:
    a limit was reached. `killed`: by a signal, its own or the kernel's."""
    exit_code: int | None
    """What it returned; None if it was killed or out of time."""
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Isolation:
    """The layers in force; `reasons` says why one is not."""

    namespaces: bool
    seccomp: bool
    landlock: bool
    reasons: tuple[str, ...] = ()

    @property
    def is_full(self) -> bool:
        """Namespaces and the filter of system calls. Landlock is for where there are no namespaces."""
        return self.namespaces and self.seccomp

    def describe(self) -> str:
        """What a program can and cannot do, for the log of an evaluation."""
        parts = [_WORLD] if self.namespaces else [_OWN_PROCESS, _READS_LITTLE if self.landlock else _READS_ALL]
        parts.append("a filter of system calls" if self.seccomp else "NO filter of system calls")
        parts.append("limits of time, memory per process, open files and output")
        return "; ".join([*parts, *(f"not in force: {reason}" for reason in self.reasons)])


_WORLD = (
    "namespaces: a program has processes, users, host name and an empty network of its own, and a file system that is "
    "read-only but for a /tmp of 16 MiB that goes with it"
)
_OWN_PROCESS = (
    "no namespaces: a program can start no process and no thread, send no signal, open no socket, and change no file"
)
_READS_LITTLE = "Landlock: it can read the files of Python and of the system's libraries alone"
_READS_ALL = "NO Landlock: it can READ every file that this user can"


class _Refused(Exception):
    """The kernel or the container would not shut a program in this way; the program has not run."""


def check_isolation(sandbox: Literal["strict", "available"]) -> Isolation:
    """What is in force here, if that is enough for `evaluation.sandbox`; ValueError otherwise, before anything runs."""
    found = isolation()
    if sandbox == "strict" and not found.is_full:
        raise ValueError(
            "evaluation.sandbox (strict) needs namespaces and a filter of system calls, and this machine or container "
            f"has: {found.describe()}. With evaluation.sandbox available, programs run so"
        )
    return found


@functools.cache
def isolation() -> Isolation:
    """What is in force on this machine: the best of four that an empty program can be run with; logged once.

    ValueError where a program can get neither namespaces nor a filter of system calls: then none is run.
    """
    reasons: list[str] = []
    for namespaces, seccomp, landlock in ((1, 1, 0), (1, 0, 0), (0, 1, 1), (0, 1, 0)):
        found = Isolation(bool(namespaces), bool(seccomp), bool(landlock))
        try:
            outcome = _run("", "", Limits(), found)
        except _Refused as refusal:
            reasons.append(str(refusal))
            continue
        if outcome.verdict == "ok":
            found = replace(found, reasons=tuple(dict.fromkeys(reasons)))
            logger.info("programs run with %s", found.describe())
            return found
        reasons.append(f"an empty program ended with {outcome.verdict}: {outcome.stderr.strip()[-200:]}")
    told = "; ".join(dict.fromkeys(reasons))
    raise ValueError(f"programs cannot be shut in on this machine, so none is run: {told}")


def run_program(source: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Runs a Python program as `__main__`, with this interpreter's version and packages, and waits for its end.

    Whatever the program does is in the outcome. ValueError where programs cannot be shut in (`isolation`).
    """
    return _run(source, stdin, limits or Limits(), isolation())


def run_all(function: Callable[[Item], Result], items: Sequence[Item], num_processes: int) -> list[Result]:
    """`function` of each item, in the items' order; at most `num_processes` at one time, by threads that wait."""
    with ThreadPoolExecutor(num_processes) as pool:
        return list(pool.map(function, items))


def _run(source: str, stdin: str, limits: Limits, layers: Isolation) -> Outcome:
    """One program under these layers. _Refused if one of them cannot be had."""
    files = [_memory_file(_job(limits, layers)), _memory_file(source), _memory_file("")]
    standard = [_memory_file(stdin), _memory_file(""), _memory_file("")]
    try:
        _start_and_wait(files, standard, limits.seconds)
        status = json.loads(_read(files[2]) or "{}")
        if "refused" in status:
            raise _Refused(status["refused"])
        return _outcome(status, *(_read(file) for file in standard[1:]), limits)
    finally:
        for file in files + standard:
            os.close(file)


def _start_and_wait(files: list[int], standard: list[int], seconds: float) -> None:
    command = [sys.executable, "-I", "-S", "-B", str(ENTER), *map(str, files)]
    process = subprocess.Popen(
        command,
        stdin=standard[0],
        stdout=standard[1],
        stderr=standard[2],
        pass_fds=files,
        env={},
        start_new_session=True,
    )
    try:
        process.wait(seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass  # then it has written no status, which counts as killed
    finally:
        process.kill()  # its children go with it
        process.wait()


def _memory_file(text: str) -> int:
    """An open file with this text, in memory, without a name, read from its start."""
    descriptor = os.memfd_create("sandbox")
    with open(descriptor, "wb", closefd=False) as opened:
        opened.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _read(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as opened:
        return opened.read().decode("utf-8", "replace")


def _job(limits: Limits, layers: Isolation) -> str:
    """What `inside/enter.py` is told."""
    return json.dumps(
        {
            "parent": os.getpid(),
            "interpreter": os.path.realpath(sys.executable),
            "visible": _visible_paths(),
            "packages": _package_folders(),
            "namespaces": layers.namespaces,
            "seccomp": layers.seccomp,
            "landlock": layers.landlock,
            "seconds": limits.seconds,
            "memory_bytes": limits.memory_mib << 20,
            "output_bytes": limits.output_mib << 20,
            "processes": limits.processes,
            "files": limits.files,
        }
    )


def _package_folders() -> list[str]:
    """Where this interpreter finds installed packages; links do not lead out of the sandbox, so without any."""
    folders = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    return [os.path.realpath(path) for path in folders]


@functools.cache
def _visible_paths() -> list[str]:
    """What a program can read: the system's libraries, the interpreter's folder, and the installed packages."""
    own = [sys.base_prefix, sys.base_exec_prefix, *_package_folders()]
    paths = dict.fromkeys([*SYSTEM_PATHS, *(os.path.realpath(path) for path in own)])
    return [path for path in paths if os.path.exists(path) and path != "/"]


def _outcome(status: dict, stdout: str, stderr: str, limits: Limits) -> Outcome:
    code = status.get("exit")
    longest = max(len(stdout.encode()), len(stderr.encode()))
    if status.get("time") or code == -signal.SIGXCPU:
        verdict, code = "time", None
    elif longest >= limits.output_mib << 20 or code == -signal.SIGXFSZ:
        verdict = "output"
    elif code is None or code < 0:
        verdict, code = "killed", None
    elif code == 0:
        verdict = "ok"
    else:
        is_memory = stderr.rstrip().rsplit("\n", 1)[-1].startswith("MemoryError")
        verdict = "memory" if is_memory else "error"
    return Outcome(verdict=verdict, exit_code=code, stdout=stdout, stderr=stderr)
