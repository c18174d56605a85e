"""The filter of system calls on both architectures, run by an interpreter of the few instructions it is made of."""

from __future__ import annotations

import errno
import os
import platform
import sys
from pathlib import Path

import pytest

from megatron_opdlm.evaluation import sandbox

ALLOWED = "allowed"
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request, monkeypatch) -> str:
    monkeypatch.setattr(platform, "machine", lambda: request.param)
    return request.param


@pytest.fixture
def inside(monkeypatch):
    """The modules of the far side, which import each other by their file names."""
    monkeypatch.syspath_prepend(str(Path(sandbox.__file__).parent / "inside"))
    import seccomp
    import system_calls

    yield seccomp, system_calls
    for name in ("seccomp", "system_calls", "kernel"):
        sys.modules.pop(name)


def judge(program: list, machine: str, number: int, *arguments: int) -> str | int:
    """What the filter says to a call: allowed, the error, or killed. Linux's filter.rst has the instructions."""
    words = {0: number, 4: AUDIT[machine]} | {16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate(arguments)}
    accumulator, position = 0, 0
    while True:
        code, if_true, if_false, constant = program[position]
        position += 1
        if code == 0x20:
            accumulator = words.get(constant, 0)
        elif code == 0x06:
            if constant == 0x7FFF0000:
                return ALLOWED
            return constant & 0xFFFF if constant >> 16 == 5 else "killed"
        else:
            holds = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x45: accumulator & constant != 0}
            position += if_true if holds[code] else if_false


def test_each_named_call_fails_and_no_other(machine, inside):
    seccomp, calls = inside
    column = sorted(AUDIT, reverse=True).index(machine)
    program = seccomp.build_filter(seccomp.ALWAYS)
    failing = {number for number in range(500) if judge(program, machine, number) == errno.EPERM}
    named = calls.OF_OTHER_PROCESSES | calls.OF_THE_SYSTEM
    assert failing == {numbers[column] for numbers in named.values()} - {None}


def test_alone_a_program_starts_nothing_signals_nobody_and_changes_no_file(machine, inside):
    seccomp, calls = inside
    column = sorted(AUDIT, reverse=True).index(machine)
    program = seccomp.build_filter(seccomp.ALWAYS | seccomp.ALONE)
    for numbers in (calls.MORE_PROCESSES | calls.SIGNALS | calls.CHANGES_OF_FILES).values():
        assert numbers[column] is None or judge(program, machine, numbers[column]) == errno.EPERM
    openat = calls.NUMBERS["openat"][column]
    assert judge(program, machine, openat, 0, 0, os.O_RDONLY | os.O_CLOEXEC) == ALLOWED
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDONLY | os.O_CREAT):
        assert judge(program, machine, openat, 0, 0, flags) == errno.EPERM


def test_some_calls_fail_for_some_arguments(machine, inside):
    seccomp, calls = inside
    column = sorted(AUDIT, reverse=True).index(machine)
    program = seccomp.build_filter(seccomp.ALWAYS)
    clone, prctl, prlimit = (calls.NUMBERS[name][column] for name in ("clone", "prctl", "prlimit64"))
    assert judge(program, machine, clone, 0x1200011) == ALLOWED  # fork
    assert judge(program, machine, clone, 0x10000011) == errno.EPERM  # with a new user namespace
    assert judge(program, machine, calls.NUMBERS["clone3"][column]) == errno.ENOSYS
    assert judge(program, machine, prctl, 1) == errno.EPERM
    assert judge(program, machine, prctl, 15) == ALLOWED
    assert judge(program, machine, prlimit, 0) == ALLOWED
    assert judge(program, machine, prlimit, 4711) == errno.EPERM


def test_a_call_of_another_architecture_kills(machine, inside):
    program = inside[0].build_filter(inside[0].ALWAYS)
    other = "aarch64" if machine == "x86_64" else "x86_64"
    assert judge(program, other, 0) == "killed"


def test_the_second_numbers_of_x86_64_fail(monkeypatch, inside):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert judge(inside[0].build_filter(inside[0].ALWAYS), "x86_64", 0x40000000 + 1) == errno.ENOSYS


def test_other_architectures_have_no_filter(monkeypatch, inside):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="system calls of riscv64 are not known"):
        inside[0].build_filter(inside[0].ALWAYS)
