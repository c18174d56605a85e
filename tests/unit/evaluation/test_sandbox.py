"""What a harmless program gets from the sandbox, and what is said of one that ends badly."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from megatron_opdlm.evaluation import sandbox
from megatron_opdlm.evaluation.sandbox import Isolation, Limits, check_isolation, isolation, run_all, run_program


def test_a_program_reads_its_input_and_its_output_comes_back(way):
    outcome = run_program("import sys\nprint(int(input()) + 1)\nprint('é', file=sys.stderr)", stdin="41\n")
    assert (outcome.verdict, outcome.exit_code, outcome.stdout, outcome.stderr) == ("ok", 0, "42\n", "é\n")


def test_a_program_is_main_with_this_interpreter_and_its_packages(way):
    outcome = run_program("import sys, numpy\nprint(__name__, sys.version)\nprint(sys.argv, numpy.__version__)")
    import numpy

    assert outcome.stdout == f"__main__ {sys.version}\n['program.py'] {numpy.__version__}\n"


def test_a_program_pickles_its_own_classes_as_a_script_does(way):
    source = "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__module__)"
    assert run_program(source).stdout == "__main__\n"


@pytest.mark.parametrize(
    ("source", "verdict", "exit_code"),
    [
        ("1 / 0", "error", 1),
        ("(", "error", 1),
        ("import sys; sys.exit(3)", "error", 3),
        ("import sys; sys.exit()", "ok", 0),
        ("x = bytearray(10 << 30)", "memory", 1),
        ("import ctypes; ctypes.string_at(0)", "killed", None),
    ],
)
def test_the_verdict_says_how_a_program_ended(way, source, verdict, exit_code):
    outcome = run_program(source, limits=Limits(memory_mib=1024))
    assert (outcome.verdict, outcome.exit_code) == (verdict, exit_code)


def test_a_failure_names_the_line_of_the_program(way):
    stderr = run_program("a = 1\nb = a / 0").stderr
    assert 'File "program.py", line 2' in stderr
    assert stderr.endswith("ZeroDivisionError: division by zero\n")


def test_sets_have_the_same_order_in_every_run(way):
    source = "print(list({'spam', 'egg', 'ham', 'bacon', 'lobster'}))"
    assert run_program(source).stdout == run_program(source).stdout


def test_many_programs_give_their_results_in_the_order_asked_for(way):
    outcomes = run_all(lambda n: run_program(f"import time; time.sleep({n}); print({n})").stdout, [0.3, 0.0, 0.1], 3)
    assert outcomes == ["0.3\n", "0.0\n", "0.1\n"]


def test_with_namespaces_a_program_starts_processes_and_writes_files():
    if not isolation().namespaces:
        pytest.skip("no namespaces here")
    source = "import os, subprocess\nopen('a', 'w').write('b')\nprint(os.getcwd(), flush=True)\n"
    outcome = run_program(source + "subprocess.run(['cat', 'a'], check=True)")
    assert outcome.stdout == "/tmp\nb"


def test_what_this_machine_has_is_described():
    text = isolation().describe()
    assert text.startswith("namespaces: " if isolation().namespaces else "no namespaces: ")
    assert "limits of time" in text


def test_the_description_says_what_is_missing():
    text = Isolation(namespaces=False, seccomp=True, landlock=False, reasons=("unshare: no",)).describe()
    assert "no namespaces" in text
    assert "it can READ every file that this user can" in text
    assert text.endswith("not in force: unshare: no")


@pytest.fixture
def refusing(monkeypatch):
    """A machine that refuses the layers of the given names."""

    def refuse(*refused: str) -> None:
        real = sandbox._run

        def run(source, stdin, limits, layers):
            for name in refused:
                if getattr(layers, name):
                    raise sandbox._Refused(f"no {name} here")
            return real(source, stdin, limits, layers)

        monkeypatch.setattr(sandbox, "_run", run)
        isolation.cache_clear()

    yield refuse
    isolation.cache_clear()


def test_without_namespaces_the_next_best_is_in_force(refusing):
    refusing("namespaces")
    assert isolation() == Isolation(namespaces=False, seccomp=True, landlock=True, reasons=("no namespaces here",))
    assert run_program("print(1)").verdict == "ok"


def test_strict_refuses_what_available_takes(refusing):
    refusing("namespaces", "landlock")
    assert not check_isolation("available").landlock
    with pytest.raises(ValueError, match=r"evaluation\.sandbox \(strict\) needs namespaces .* no landlock here"):
        check_isolation("strict")


def test_without_namespaces_and_filter_nothing_runs(refusing):
    refusing("namespaces", "seccomp")
    with pytest.raises(ValueError, match="none is run: no namespaces here; no seccomp here"):
        run_program("print(1)")


def test_packages_behind_a_link_are_found(way, tmp_path, monkeypatch):
    folder = Path(psutil.__file__).parents[1].resolve()
    link = tmp_path / "site-packages"
    link.symlink_to(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != folder] + [str(link)])
    sandbox._visible_paths.cache_clear()
    assert run_program("import psutil").verdict == "ok"
    sandbox._visible_paths.cache_clear()
