"""Runs `generate` as a person or a pipe would, in processes of their own that need not import everything anew.

ran = run_generate(["--hf", folder, "--prompt", "1+1="], tmp_path, stdin="")
ran.code, ran.stdout, ran.stderr

with Terminal(["--hf", folder]) as terminal:            # stdin, stdout and stderr are a terminal
    terminal.expect("> ")
    terminal.send("1+1=\n")
    terminal.wait()                                     # the exit code
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import FORKED

TIME_LIMIT = 240.0
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""What moves the cursor, clears lines or sets colours."""


@dataclass(frozen=True)
class Ran:
    """A process that has ended."""

    code: int
    stdout: str
    stderr: str


def run_generate(arguments: list[str], folder: Path, stdin: str = "") -> Ran:
    """With files for the three streams, in `folder`."""
    paths = [folder / name for name in ("stdin", "stdout", "stderr")]
    paths[0].write_text(stdin)
    process = _start(_run_with_files, arguments, [str(path) for path in paths])
    process.join(TIME_LIMIT)
    assert not process.is_alive(), f"it did not end within {TIME_LIMIT:.0f} s"
    return Ran(process.exitcode, paths[1].read_text(), paths[2].read_text())


class Terminal:
    """A terminal of 80 columns and 24 rows, and the program in it."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        self.output = ""
        """All that the program has written."""
        self._read_to = 0
        self._master, slave = pty.openpty()
        # Without it ctrl-C drops output that nobody has read yet: after the signal, so what answers it may go too.
        attributes = termios.tcgetattr(slave)
        attributes[3] |= termios.NOFLSH
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {"TERM": "xterm-256color", "NO_COLOR": ""} | (environment or {})
        self._process = _start(_run_in_terminal, arguments, os.ttyname(slave), environment)
        self._slave = slave

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.join()
        os.close(self._slave)
        os.close(self._master)

    def send(self, text: str) -> None:
        """As if typed; "\\x03" is ctrl-C."""
        os.write(self._master, text.encode())

    def expect(self, text: str) -> str:
        """Waits for the text in what comes next; what came up to it."""
        deadline = time.monotonic() + TIME_LIMIT
        while (place := self.output.find(text, self._read_to)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.output[self._read_to :]!r}"
            assert self._process.is_alive() or self._is_readable(), f"ended without {text!r}: {self.output!r}"
            self._read()
        before, self._read_to = self.output[self._read_to : place], place + len(text)
        return before

    def wait(self) -> int:
        """The exit code."""
        deadline = time.monotonic() + TIME_LIMIT
        while self._process.is_alive():
            assert time.monotonic() < deadline, f"it did not end: {self.output!r}"
            self._read()
        while self._is_readable():
            self._read()
        return self._process.exitcode

    @property
    def frames(self) -> list[str]:
        """What was on the screen below the cursor, one drawing after the other, without colours."""
        drawings = re.split(r"\r?\x1b\[(?:1A|2K)(?:\x1b\[(?:1A|2K))*", self.output)
        return [ESCAPES.sub("", drawing).replace("\r\n", "\n") for drawing in drawings]

    @property
    def screen(self) -> str:
        """What stands on the screen at the end, without colours; no line is longer than the screen is wide."""
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.output):
            if part == "\n":
                row += 1
                rows += [""] * (row == len(rows))
            elif part == "\r":
                column = 0
            elif part == "\x1b[1A":
                row -= 1
            elif part == "\x1b[2K":
                rows[row] = ""
            elif not part.startswith("\x1b"):
                rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
                column += len(part)
        return "\n".join(rows).rstrip("\n")

    def _is_readable(self) -> bool:
        return bool(select.select([self._master], [], [], 0.05)[0])

    def _read(self) -> None:
        if self._is_readable():
            self.output += os.read(self._master, 65536).decode(errors="replace")


def _start(target, *arguments):
    process = FORKED.Process(target=target, args=arguments)
    process.start()
    return process


def _run_with_files(arguments: list[str], paths: list[str]) -> None:
    flags = (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT | os.O_TRUNC] * 2)
    for number, (path, flag) in enumerate(zip(paths, flags, strict=True)):
        os.dup2(os.open(path, flag, 0o600), number)
    _run(arguments)


def _run_in_terminal(arguments: list[str], name: str, environment: dict[str, str]) -> None:
    os.environ |= environment
    os.setsid()
    terminal = os.open(name, os.O_RDWR)  # becomes the session's, so that ctrl-C reaches this process
    for number in range(3):
        os.dup2(terminal, number)
    _run(arguments)


def _run(arguments: list[str]) -> None:
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode) for number, mode in enumerate("rww"))  # noqa: SIM115
    from megatron_opdlm.generate import main

    main(arguments)
