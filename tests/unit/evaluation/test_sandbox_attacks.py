"""Programs that mean harm: each is contained, and says so by failing or by what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_opdlm.evaluation import sandbox
from megatron_opdlm.evaluation.sandbox import Limits, Outcome, isolation, run_program

REPOSITORY = Path(__file__).parents[3]
MARK = "sandbox-attack-87b1"  # in the attacks' text, so that what is left of one would be found by it


def attack(source: str, **limits) -> Outcome:
    """Runs it with small limits; afterwards nothing of it may be left, nor any child of this process."""
    started = time.monotonic()
    before = psutil.Process().children(recursive=True)
    limits = Limits(**{"seconds": 5, "memory_mib": 512, "output_mib": 1, "processes": 4} | limits)
    outcome = run_program(f"# {MARK}\n{source}", limits=limits)
    assert set(psutil.Process().children(recursive=True)) <= set(before), "something outlived the program"
    assert time.monotonic() - started < limits.seconds + 20, "it was not stopped in time"
    return outcome


def tries(statements: list[str]) -> str:
    """A program that makes each statement and prints it if nothing stopped it."""
    lines = [f"try:\n    {line}\n    print({line!r})\nexcept OSError:\n    pass" for line in statements]
    return "import os, signal, socket, subprocess, shutil\n" + "\n".join(lines)


def test_a_fork_bomb_runs_out_of_processes(way):
    source = (
        "import os, time\n"
        "count = 1\n"
        "try:\n"
        "    while True:\n"
        "        if os.fork() == 0: time.sleep(60)\n"
        "        count += 1\n"
        "except OSError as error: print(count)"
    )
    outcome = attack(source)
    assert (outcome.verdict, outcome.stdout) == ("ok", "4\n" if way.namespaces else "1\n")


def test_a_fork_bomb_whose_children_fork_too_ends_with_its_time(way):
    source = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert attack(source, seconds=1).verdict == "time"


def test_threads_count_as_processes(way):
    source = (
        "import threading\n"
        "count = 1\n"
        "try:\n"
        "    while True:\n"
        "        threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "        count += 1\n"
        "except RuntimeError: print(count)"
    )
    assert attack(source).stdout == ("4\n" if way.namespaces else "1\n")


def test_an_allocation_of_10_gb_fails(way):
    assert attack("x = bytearray(10 << 30)").verdict == "memory"


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\nwhile True:\n    try: time.sleep(100)\n    except BaseException: pass",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nwhile True: signal.pause()",
        "import os\nwhile True:\n    try: os.write(1, bytes(65536))\n    except OSError: pass",
    ],
    ids=["loop", "sleep", "blocked_signals", "endless_output"],
)
def test_a_program_without_end_is_stopped(way, source):
    outcome = attack(source, seconds=1)
    assert (outcome.verdict, outcome.exit_code) == ("time", None)
    assert len(outcome.stdout) <= 1 << 20


def test_output_is_cut_at_its_limit(way):
    outcome = attack("while True: print('x' * 1000)")
    assert outcome.verdict == "output"
    assert len(outcome.stdout) == 1 << 20


def test_nothing_can_be_written_outside(way, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    paths = [tmp_path / "made", REPOSITORY / "made", Path("/made"), Path("/usr/made"), Path("/etc/made")]
    statements = [f"open({str(path)!r}, 'w')" for path in [*paths, victim]]
    statements += [f"os.{name}({str(victim)!r})" for name in ("remove", "listdir")]
    statements += [f"os.{name}({str(victim)!r}, 0)" for name in ("chmod", "truncate")]
    statements += [f"os.open({str(victim)!r}, os.O_RDONLY | os.O_TRUNC)", f"shutil.rmtree({str(tmp_path)!r})"]
    assert attack(tries(statements)).stdout == ""
    assert victim.read_text() == "whole"
    assert not any(path.exists() for path in paths)


def test_files_of_others_cannot_be_read(way, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    statements = [f"open({path!r})" for path in (str(secret), __file__, "/etc/passwd", f"/proc/{os.getpid()}/maps")]
    assert attack(tries(statements)).stdout == ""


def test_files_of_python_and_the_system_cannot_be_changed(way):
    statements = [f"open({path!r}, 'a')" for path in (os.__file__, psutil.__file__, "/usr/bin/env", "/dev/sda")]
    assert attack(tries(statements)).stdout == ""


def test_with_namespaces_all_but_tmp_is_read_only_for_everybody():
    if not isolation().namespaces:
        pytest.skip("no namespaces here")
    places = ["/", "/usr", os.path.dirname(os.__file__), os.path.dirname(psutil.__file__), "/tmp"]
    outcome = attack(f"import os\nprint([bool(os.statvfs(p).f_flag & os.ST_RDONLY) for p in {places}])")
    assert outcome.stdout == "[True, True, True, True, False]\n"


def test_there_are_no_sockets_of_any_family(way):
    families = ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_VSOCK"]
    statements = [f"socket.socket(socket.{family})" for family in families]
    statements += ["socket.create_connection(('127.0.0.1', 22), timeout=1)", "socket.getaddrinfo('example.org', 80)"]
    assert attack(tries(statements)).stdout == ""


def test_the_environment_of_the_parent_is_not_to_be_had(way, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", MARK)
    source = (
        "import glob, os\n"
        "print(os.environ)\n"
        "for file in [*glob.glob('/proc/*/environ'), f'/proc/{os.getppid()}/environ', '/proc/1/environ',\n"
        f"             '/proc/{os.getpid()}/environ']:\n"
        "    try: print(open(file).read())\n"
        "    except OSError: pass"
    )
    outcome = attack(source)
    assert "PYTHONHASHSEED" in outcome.stdout
    assert "SECRET_TOKEN" not in outcome.stdout


def test_the_parent_and_all_others_survive_a_killer(way):
    own, group = os.getpid(), os.getpgid(0)
    targets = [f"os.getppid(), {number}" for number in (9, 15, 19)]
    targets += [f"{number}, 9" for number in (own, -group, psutil.Process().ppid(), -1, 0)]
    source = "import os\n" + "\n".join(f"try: os.kill({it})\nexcept OSError: pass" for it in targets[:-1])
    source += "\nprint('alive')\nos.kill(0, 9)"
    assert attack(source).verdict == ("killed" if way.namespaces else "error")
    assert psutil.Process(own).status() != psutil.STATUS_STOPPED


def test_limits_of_others_cannot_be_changed(way):
    targets = [os.getpid(), "os.getppid()"]
    source = "import os, resource\n" + "\n".join(
        f"try:\n    resource.prlimit({target}, resource.RLIMIT_CPU, (0, 0)); print('changed')\nexcept OSError: pass"
        for target in targets
    )
    assert attack(source).stdout == ""


def test_a_program_cannot_raise_its_own_limits(way):
    source = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"
    assert attack(source).stderr.endswith("ValueError: not allowed to raise maximum limit\n")


def test_orphans_end_with_the_program(way):
    source = (
        "import os, time\n"
        "for _ in range(2):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0: time.sleep(600)\n"
        "        os._exit(0)\n"
        "print('left')"
    )
    outcome = attack(source)
    assert outcome.stdout == ("left\n" if way.namespaces else "")
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not any("-X utf8 -c import sys" in line and "int(sys.argv[1])" in line for line in lines)


def test_only_the_standard_files_are_open(way):
    source = (
        "import os\nfor number in range(3, 200):\n    try: print(number, os.fstat(number))\n    except OSError: pass"
    )
    with open(__file__) as inherited:
        os.set_inheritable(inherited.fileno(), True)
        assert attack(source).stdout == ""


def test_the_process_is_not_privileged(way):
    source = (
        "import ctypes, os\n"
        "header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"
        "assert ctypes.CDLL(None).capget(header, sets) == 0\n"
        "print(list(sets)[:2], list(sets)[3:5], ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))"
    )
    assert attack(source).stdout == "[0, 0] [0, 0] 1\n"


def test_new_namespaces_and_mounts_are_refused(way):
    source = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None)\n"
        "print([libc.unshare(0x10000000), libc.mount(b'a', b'/tmp', b'tmpfs', 0, None), libc.chroot(b'/tmp'),\n"
        "       libc.ptrace(16, os.getppid(), 0, 0), libc.prctl(1, 0, 0, 0, 0), libc.memfd_create(b'a', 0)])"
    )
    assert attack(source).stdout == f"{[-1] * 6}\n"


def test_a_killed_evaluation_leaves_no_program_behind(way, tmp_path):
    # the file alone, because the package imports torch, which takes seconds
    script = tmp_path / "evaluation.py"
    script.write_text(
        "import sandbox\n"
        f"layers = sandbox.{way!r}\n"
        "sandbox._run('import time; time.sleep(60)', '', sandbox.Limits(seconds=60), layers)\n"
    )
    environment = {"PYTHONPATH": str(Path(sandbox.__file__).parent)}
    with subprocess.Popen([sys.executable, str(script)], env=environment) as evaluation:
        programs = _wait_for(lambda: psutil.Process(evaluation.pid).children(recursive=True), 2)
        evaluation.kill()
    assert psutil.wait_procs(programs, timeout=10)[1] == []


def _wait_for(find, count: int) -> list:
    deadline = time.monotonic() + 20
    while len(found := find()) < count:
        assert time.monotonic() < deadline, "the program did not start"
        time.sleep(0.05)
    return found
