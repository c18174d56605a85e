"""System calls that a program must not make. It can never take the filter off, nor can what it starts.

    forbid(ALWAYS)
    forbid(ALWAYS | ALONE)            # where it has no world of its own

A forbidden call fails with "Operation not permitted", as it would without the rights to it, so the program goes on.
Needs PR_SET_NO_NEW_PRIVS. The filter is a classic BPF program (Linux: Documentation/userspace-api/seccomp_filter.rst).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from errno import ENOSYS, EPERM

from kernel import PR_SET_PDEATHSIG, PR_SET_SECCOMP, call, number
from system_calls import CHANGES_OF_FILES, MORE_PROCESSES, OF_OTHER_PROCESSES, OF_THE_SYSTEM, SIGNALS

ALWAYS = frozenset(OF_OTHER_PROCESSES | OF_THE_SYSTEM)
ALONE = frozenset(MORE_PROCESSES | SIGNALS | CHANGES_OF_FILES)

# From include/uapi/linux/{bpf_common,seccomp,audit}.h.
LOAD, IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_CALLS = 0x40000000  # x86_64's second set of numbers for the same calls
SECCOMP_MODE_FILTER = 2

NEW_NAMESPACES = 0x7E020000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

Instruction = tuple[int, int, int, int]  # code, how many to skip if true, if false, constant


def forbid(names: frozenset[str]) -> None:
    """Installs the filter in this process. OSError where the kernel or the architecture has none."""
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in build_filter(names))
    buffer = ctypes.create_string_buffer(program, len(program))
    structure = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(structure), 0, 0)


def build_filter(names: frozenset[str]) -> list[Instruction]:
    """The instructions that fail the calls of these names, and some calls for some arguments only."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError(f"system calls of {machine} are not known here")
    program = [(LOAD, 0, 0, 4), (IF_EQUAL, 1, 0, ARCHITECTURES[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if machine == "x86_64":
        program += [(IF_AT_LEAST, 0, 1, X32_CALLS), (RETURN, 0, 0, FAIL | ENOSYS)]
    for name in sorted(names):
        program += _fail(name, EPERM)
    program += _fail("clone3", ENOSYS)  # its flags are in memory, which no filter reads; callers turn to clone
    if "clone" not in names:
        program += _fail_if(IF_ANY_BIT, "clone", 0, NEW_NAMESPACES)
    program += _fail_if(IF_EQUAL, "prctl", 0, PR_SET_PDEATHSIG)
    program += _fail_unless_zero("prlimit64", 0)  # the limits of another process
    if "unlinkat" in names:
        program += _fail_if(IF_ANY_BIT, "open", 1, WRITING) + _fail_if(IF_ANY_BIT, "openat", 2, WRITING)
        program += _fail("openat2", ENOSYS)
    return [*program, (RETURN, 0, 0, ALLOW)]


def _fail(name: str, error: int) -> list[Instruction]:
    if number(name) is None:
        return []
    return [(IF_EQUAL, 0, 1, number(name)), (RETURN, 0, 0, FAIL | error)]


def _fail_if(test: int, name: str, argument: int, value: int) -> list[Instruction]:
    """Fails the call if the low half of an argument passes the test; the last instruction reads the number again."""
    if number(name) is None:
        return []
    return [
        (IF_EQUAL, 0, 4, number(name)),
        (LOAD, 0, 0, 16 + 8 * argument),
        (test, 0, 1, value),
        (RETURN, 0, 0, FAIL | EPERM),
        (LOAD, 0, 0, 0),
    ]


def _fail_unless_zero(name: str, argument: int) -> list[Instruction]:
    return [
        (IF_EQUAL, 0, 4, number(name)),
        (LOAD, 0, 0, 16 + 8 * argument),
        (IF_EQUAL, 1, 0, 0),
        (RETURN, 0, 0, FAIL | EPERM),
        (LOAD, 0, 0, 0),
    ]
