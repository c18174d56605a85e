"""Files that a program may read, where it has no file system of its own: Landlock, Linux 5.13, needs no rights.

    allow_reading(["/usr", "/lib/x86_64-linux-gnu"])   # and nothing else, nor writing, nor other users of ptrace

Needs PR_SET_NO_NEW_PRIVS. Linux: Documentation/userspace-api/landlock.rst; the first version of its interface will do.
"""

from __future__ import annotations

import ctypes
import os
import struct

from kernel import syscall

EXECUTE, READ_FILE, READ_FOLDER = 1 << 0, 1 << 2, 1 << 3
ALL_OF_VERSION_1 = (1 << 13) - 1
RULE_PATH_BENEATH = 1


def allow_reading(paths: list[str]) -> None:
    """From here on files open only for reading, under `paths` only. OSError where the kernel has no Landlock."""
    attributes = struct.pack("=Q", ALL_OF_VERSION_1)
    ruleset = syscall("landlock_create_ruleset", attributes, ctypes.c_size_t(len(attributes)), 0)
    for path in paths:
        _allow(ruleset, path)
    syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    access = EXECUTE | READ_FILE | (READ_FOLDER if os.path.isdir(path) else 0)
    syscall("landlock_add_rule", ruleset, RULE_PATH_BENEATH, struct.pack("=Qi", access, descriptor), 0)
    os.close(descriptor)
