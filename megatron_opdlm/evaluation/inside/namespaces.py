"""A program's own small world: its process numbers, network, host name, and a file system that is read-only but /tmp.

    separate()                                 # in the process that starts the sandbox
    if os.fork() == 0:                         # process 1 of the world
        build_root(["/usr", "/lib", "/lib64"])
        leave_privileges()

With root's rights the world is built as root, which reaches an interpreter that other users do not, and left as nobody.
Without them a user namespace lends those rights. OSError says what the kernel or the container refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

from kernel import PR_SET_DUMPABLE, call, syscall

# From include/uapi/linux/sched.h.
NEW_MOUNTS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
EVERYTHING_BUT_USER = NEW_MOUNTS | NEW_CGROUP | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET

# From include/uapi/linux/mount.h.
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
READ_ONLY, NO_SETUID, NO_DEVICES = 1, 2, 4

DEVICES = ("null", "zero", "full", "random", "urandom")
NOBODY = 65534
TMPFS_LIMITS = b"size=16m,nr_inodes=4096"


def separate() -> None:
    """Gives this process, and its children, namespaces of their own."""
    if os.geteuid() == 0:
        call("unshare", EVERYTHING_BUT_USER)
        return
    user, group = os.geteuid(), os.getegid()
    call("unshare", EVERYTHING_BUT_USER | NEW_USER)
    _map_ids(user, group)


def _map_ids(user: int, group: int) -> None:
    """In a user namespace that this process has just made: these two are who they were outside, all others nobody."""
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{file}", "w") as opened:
            opened.write(text)


def build_root(visible: list[str]) -> None:
    """Replaces the file system: `visible` paths and a few devices, read-only, and an empty /tmp to write to."""
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    _mount_tmpfs("/tmp", b"mode=755")
    os.chdir("/tmp")
    os.mkdir("outside")
    syscall("pivot_root", b".", b"outside")
    os.chdir("/")
    os.mkdir("/tmp")
    _mount_tmpfs("/tmp", b"mode=1777")
    for path in visible:  # some may lie under /tmp, and are then read-only there
        _show(path)
    _add_devices()
    os.mkdir("/proc")
    with contextlib.suppress(OSError):  # containers that hide parts of /proc allow no other: then there is none at all
        call("mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    call("umount2", b"/outside", MNT_DETACH)
    os.rmdir("/outside")
    _set_attributes("/", READ_ONLY | NO_SETUID | NO_DEVICES, recursive=False)
    os.chdir("/tmp")


def _mount_tmpfs(path: str, mode: bytes) -> None:
    call("mount", b"tmpfs", path.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, TMPFS_LIMITS + b"," + mode)


def _show(path: str) -> None:
    """Makes a path of the outside readable under its own name."""
    outside = "/outside" + path
    if os.path.lexists(path):
        return  # inside a folder that is shown already
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(outside):
        os.symlink(os.readlink(outside), path)
        return
    _bind(outside, path)
    _set_attributes(path, READ_ONLY | NO_SETUID | NO_DEVICES, recursive=True)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    call("mount", source.encode(), target.encode(), None, MS_BIND | MS_REC, None)


def _add_devices() -> None:
    os.mkdir("/dev")
    for name in DEVICES:
        _bind(f"/outside/dev/{name}", f"/dev/{name}")
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"/dev/{name}")


def _set_attributes(path: str, attributes: int, *, recursive: bool) -> None:
    """mount_setattr(2), Linux 5.12: adds attributes to a mount, and to those under it."""
    structure = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = ctypes.c_uint(AT_RECURSIVE if recursive else 0)
    syscall("mount_setattr", AT_FDCWD, path.encode(), flags, structure, ctypes.c_size_t(32))


def leave_privileges() -> int | None:
    """Ends root's rights, in process 1.

    Returns how many processes the kernel counts for the user so far, in a count apart from all other processes of that
    user on the machine; None if there is no such count.
    """
    if os.geteuid() != 0:
        drop_capabilities()
        return 2  # the user namespace that `separate` made has process 1 and the one outside
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # the change of user made /proc/self root's
    try:
        call("unshare", NEW_USER)
        _map_ids(NOBODY, NOBODY)
        num_counted = 1
    except OSError:
        num_counted = None
    drop_capabilities()
    return num_counted


def drop_capabilities() -> None:
    """No capability is left. With PR_SET_NO_NEW_PRIVS the next program gets none either, root's included."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    syscall("capset", header, (ctypes.c_uint32 * 6)())
