"""System calls that Python has no function for, with the C library's errors as OSError.

call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
syscall("pivot_root", b".", b"old")
"""

from __future__ import annotations

import ctypes
import os
import platform

from system_calls import NUMBERS

_libc = ctypes.CDLL(None, use_errno=True)

# From include/uapi/linux/prctl.h.
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_COLUMNS = {"x86_64": 0, "aarch64": 1}


def number(name: str) -> int | None:
    """The number of a system call on this machine; None where it has none. OSError on an unknown architecture."""
    machine = platform.machine()
    if machine not in _COLUMNS:
        raise OSError(f"system calls of {machine} are not known here")
    return NUMBERS[name][_COLUMNS[machine]]


def call(name: str, *arguments) -> int:
    """What the C library's function of that name returns. OSError if it fails."""
    result = getattr(_libc, name)(*arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def syscall(name: str, *arguments) -> int:
    """What the system call of that name returns. OSError if it fails."""
    try:
        return call("syscall", ctypes.c_long(number(name)), *arguments)
    except OSError as error:
        raise OSError(error.errno, f"{name}: {os.strerror(error.errno)}" if error.errno else str(error)) from error
