"""Shuts itself in and becomes a program of unknown intent; `megatron_opdlm.evaluation.sandbox` starts it by its path.

    python -I -S -B enter.py JOB PROGRAM STATUS    # three open files: what to do, the Python text, what became of it

This process stays outside and keeps the time. With namespaces its child is process 1 of a world of its own, which ends
with all that is in it when process 1 does, and the child's child becomes the program. Without, its child does.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from kernel import PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, call
from landlock import allow_reading
from namespaces import build_root, drop_capabilities, leave_privileges, separate
from seccomp import ALONE, ALWAYS, forbid
from system_calls import MORE_PROCESSES

# The program's text comes through an open file, so that it needs no place on a disk.
START = """import sys
with open(int(sys.argv[1]), encoding="utf-8") as _file:
    _text = _file.read()
sys.path.extend(sys.argv[2:])
sys.argv = ["program.py"]
_code = compile(_text, "program.py", "exec")
del _file, _text, sys
exec(_code)
"""
# Sets and dicts have the same order in every run, and numerical libraries start no threads.
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class Status:
    """What became of the program, as a JSON object in an open file that the program does not have."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def write(self, **fields) -> None:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(fields).encode(), 0)

    def exists(self) -> bool:
        return os.fstat(self.descriptor).st_size > 0


def main() -> None:
    job_file, program, status_file = (int(number) for number in sys.argv[1:])
    for descriptor in (job_file, program, status_file):
        os.set_inheritable(descriptor, False)
    with open(job_file, encoding="utf-8") as opened:
        job = json.load(opened)
    status = Status(status_file)
    _die_with(job["parent"])
    with open("/proc/self/oom_score_adj", "w") as opened:
        opened.write("1000")  # when the machine runs out of memory, programs go first
    if job["namespaces"]:
        try:
            separate()
        except OSError as error:
            status.write(refused=str(error))
            return
    # The child sees by its end of a pipe whether this process is still there; in a world of its own it has no parent.
    childs_end, own_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(own_end)
        _die_with_the_writer_of(childs_end)
        (_be_process_one if job["namespaces"] else _become)(job, program, status)
    _keep_time(child, job, status)


def _die_with(parent: int) -> None:
    """This process is killed when the one that started it ends, and ends here if that has ended already."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _die_with_the_writer_of(pipe: int) -> None:
    """As `_die_with`, for a child that its parent has just forked, which alone can write to the pipe."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([pipe], [], [], 0)[0]:
        os._exit(1)
    os.close(pipe)


def _keep_time(child: int, job: dict, status: Status) -> None:
    """Waits for the child; kills it when its time is over. Process 1 is gone only after all others of its world."""
    ended, _, _ = select.select([os.pidfd_open(child)], [], [], job["seconds"])
    if not ended:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not ended:
        status.write(time=True)
    elif not status.exists():
        status.write(exit=code)


def _be_process_one(job: dict, program: int, status: Status) -> None:
    """Builds the world, starts the program in it and waits for it, taking leave of orphans on the way."""
    try:
        build_root(job["visible"])
        num_counted = leave_privileges()
        # The change of user has cleared it; process 0 is the one outside, whose number is not to be seen from here.
        _die_with(0)
    except OSError as error:
        status.write(refused=str(error))
        os._exit(1)
    child = os.fork()
    if child == 0:
        _become(job, program, status, num_counted)
    while True:
        ended, code = os.wait()
        if ended == child:
            if not status.exists():
                status.write(exit=os.waitstatus_to_exitcode(code))
            os._exit(0)


def _become(job: dict, program: int, status: Status, num_counted: int | None = None) -> None:
    """Takes on the limits and turns into the program; never returns."""
    try:
        os.setsid()
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if not job["namespaces"]:
            os.chdir("/")
            drop_capabilities()
            if job["landlock"]:
                allow_reading(job["visible"])
        _limit(job, num_counted)
        if job["seccomp"]:
            forbid(ALWAYS | _more(job, num_counted))
        os.set_inheritable(program, True)
        arguments = [
            job["interpreter"],
            "-s",
            "-S",
            "-P",
            "-B",
            "-X",
            "utf8",
            "-c",
            START,
            str(program),
            *job["packages"],
        ]
        os.execve(job["interpreter"], arguments, ENVIRONMENT)
    except OSError as error:
        status.write(refused=str(error))
    os._exit(1)


def _more(job: dict, num_counted: int | None) -> frozenset[str]:
    """What else is forbidden, where namespaces or the count of processes do not take care of it."""
    if not job["namespaces"]:
        return ALONE
    return frozenset(MORE_PROCESSES) if num_counted is None else frozenset()


def _limit(job: dict, num_counted: int | None) -> None:
    """Limits of this process and of each that it starts; the number of processes is that of all of them."""
    seconds = int(job["seconds"]) + 1
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: job["output_bytes"],
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_NOFILE: job["files"],
        resource.RLIMIT_MEMLOCK: 0,
    }
    if num_counted is not None:
        limits[resource.RLIMIT_NPROC] = num_counted + job["processes"]
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


if __name__ == "__main__":
    main()
