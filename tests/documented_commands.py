"""The commands that README files and other pages show, and whether they could run.

A fenced block whose language is bash or sh says behind it how its commands are checked, in words that readers of the
page do not see:

    ```bash tested-by=tests/end_to_end/test_quickstart.py,.ci/run      these run the block's programs
    ```bash gpu           needs GPUs          ```bash cluster      needs a scheduler, several machines or containers
    ```bash hub           needs a network     ```bash slow         takes longer than the suite should

Whatever the word, each command is parsed as it would be when it runs, up to the point where work begins: the files of
this repository that it names exist, flags and values are those that the program takes, settings are checked together.

    for block in blocks(ROOT / "README.md"):
        for command in block.commands:
            problem(command)                        # None, or what is wrong with it
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jsonargparse

from megatron_opdlm.config import check, load, required
from megatron_opdlm.config.check import check_layout
from megatron_opdlm.terminal import arguments as of_generate

ROOT = Path(__file__).parents[1]
MARKS = ("gpu", "cluster", "hub", "slow")
OURS = ("megatron_opdlm/", "examples/", "tools/", "launch/", "tests/", "requirements/", "notes/", "docs/")
TAKEN_AS_THEY_ARE = ("cd", "source", "export", "mkdir", "cp", "ls", "cat", "tail", "git", "rsync", "diff")
"""Programs of the system, of which only the files they name are checked."""
OTHERS = {
    "hub": ("hf",),
    "gpu": ("vllm", "lmdeploy", "sglang", "nvidia-smi"),
    "cluster": ("docker", "sbatch", "srun", "squeue", "scontrol", "scancel", "kubectl", "enroot", "apptainer", "ssh"),
}
"""Programs of others, each with the word that a block must have to show it."""
OWN_MODELS = ROOT / "tests/fixtures/own_models.yaml"
"""What a recipe of the reader's own says besides: the folders its models come from."""
READS_FLAGS = re.compile(r"ArgumentParser\(|load_config\(|parse_arguments\(")
READS_FOLDERS = {
    "settings_of_hf": lambda _: {},
    "settings_of_checkpoint": lambda _: {},
    "checkpoint_folder": Path,
}
"""What stands in where `generate` asks the model's folder, which is the reader's own, for defaults."""


class Parsed(BaseException):
    """The program has read its arguments."""


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands."""

    place: str
    """FILE:LINE of its fence."""
    words: tuple[str, ...]
    """What stands behind the language."""
    commands: tuple[str, ...]
    """One line each, without comments."""


def pages() -> list[Path]:
    """All Markdown pages of the repository."""
    return sorted({*ROOT.glob("*.md"), *(page for folder in OURS for page in (ROOT / folder).rglob("*.md"))})


def blocks(page: Path) -> Iterator[Block]:
    """The shell blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page.name
    fence: tuple[int, str, list[str]] | None = None
    for number, line in enumerate(lines, start=1):
        if fence is None and line.lstrip().startswith("```"):
            fence = (number, line.strip().removeprefix("```"), [])
        elif fence is not None and line.strip() == "```":
            language, *words = fence[1].split() or [""]
            if language in ("bash", "sh", "shell", "console"):
                yield Block(f"{name}:{fence[0]}", tuple(words), tuple(_joined(fence[2])))
            fence = None
        elif fence is not None:
            fence[2].append(line)


def indented_commands(page: Path) -> list[str]:
    """Lines of indented blocks that are commands; pages show those in fenced blocks, where they have a mark."""
    programs = ("python", "torchrun", "bash", "sh", "pip", *TAKEN_AS_THEY_ARE[2:3], *sum(OTHERS.values(), ()))
    pattern = re.compile(rf"^    (?:\$ )?(?:[A-Z_]+=\S+ )*(?:{'|'.join(map(re.escape, programs))}) ")
    return [line.strip() for line in page.read_text(encoding="utf-8").splitlines() if pattern.match(line)]


def _joined(lines: Sequence[str]) -> Iterator[str]:
    """Commands in one line each, without comments and empty lines."""
    text = "\n".join(line.strip() for line in lines)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield shlex.join(words)


def mark_problem(block: Block) -> str | None:
    """What is wrong with the words behind a block's language."""
    if len(block.words) != 1:
        return f"needs one word behind its language: tested-by=FILE or one of {', '.join(MARKS)}"
    word = block.words[0]
    if word in MARKS:
        return None
    if not word.startswith("tested-by="):
        return f"{word} is no mark: tested-by=FILE or one of {', '.join(MARKS)}"
    tests = word.removeprefix("tested-by=")
    files = [ROOT / test for test in tests.split(",")]
    if absent := [str(file.relative_to(ROOT)) for file in files if not file.is_file()]:
        return f"there is no test {', '.join(absent)}"
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    unnamed = [name for command in block.commands if (name := program_name(command)) not in text]
    return f"{tests} runs no {', '.join(unnamed)}" if unnamed else None


def program_name(command: str) -> str:
    """What a test that runs the command must name: a module, a shell script, or the stem of a Python file."""
    words = _without_assignments(shlex.split(command))
    if "-m" in words and words[0] in ("python", "torchrun"):
        return words[words.index("-m") + 1].removeprefix("megatron_opdlm.")
    scripts = [word for word in words if word.endswith((".py", ".sh"))]
    return Path(scripts[0]).name.removesuffix(".py") if scripts else words[0]


def problem(command: str, marks: Sequence[str] = MARKS) -> str | None:
    """Why the command could not run, or None. `marks` are the words of its block."""
    words = _without_assignments(shlex.split(command))
    files = [word.rstrip(")") for word in words]  # of <(cat FILE) too
    if missing := [file for file in files if file.startswith(OURS) and not _exists(file)]:
        return f"there is no {', '.join(missing)}"
    if words[0] in TAKEN_AS_THEY_ARE:
        return None
    if words[-1] == "...":  # abbreviated: the page has it in full elsewhere
        return None
    if "--" in words and (found := _python(words[words.index("--") + 1 :])):  # what a launcher is to run
        return found
    program = words[2].split(".")[0] if words[:2] == ["python", "-m"] else words[0]
    for mark, programs in OTHERS.items():
        if program in programs:
            return None if mark in marks else f"{program} needs the mark {mark}"
    reader = READERS.get(words[0])
    return reader(words[1:]) if reader else f"{words[0]} is no program that this check knows"


def _exists(word: str) -> bool:
    return bool(list(ROOT.glob(word.rstrip("/")))) if "*" in word else (ROOT / word).exists()


def _without_assignments(words: list[str]) -> list[str]:
    start = next((n for n, word in enumerate(words) if not re.match(r"[A-Za-z_]\w*=", word)), len(words))
    return words[start:] or ["export"]


def _python(words: list[str], world_size: int | None = None) -> str | None:
    if words[:1] == ["-m"]:
        return _run_module(words[1], words[2:], world_size)
    return _run_file(Path(words[0]), words[1:], world_size)


def _torchrun(words: list[str]) -> str | None:
    from torch.distributed.run import get_args_parser

    parsed, said = _quietly(lambda: get_args_parser().parse_args(words))
    if parsed is None:
        return said
    sizes = [parsed.nproc_per_node, parsed.nnodes.removeprefix("1:")]  # 1:1 is the default of --nnodes
    world_size = int(sizes[0]) * int(sizes[1]) if all(size.isdigit() for size in sizes) else None
    program = (["-m"] if parsed.module else []) + [parsed.training_script, *parsed.training_script_args]
    return _python(program, world_size)


def _bash(words: list[str]) -> str | None:
    return None if (ROOT / words[0]).is_file() else f"there is no {words[0]}"


def _pip(words: list[str]) -> str | None:
    if words[0] not in ("install", "download"):
        return "only `pip install` and `pip download` are known"
    extras = re.findall(r"(?:\.|megatron-opdlm)\[([\w,-]+)\]", " ".join(words))
    declared = set(re.findall(r'^        "([\w-]+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
    unknown = [name for text in extras for name in text.split(",") if name not in declared]
    return f"setup.py has no extra {', '.join(unknown)}" if unknown else None


READERS: dict[str, Callable[[list[str]], str | None]] = {
    "python": _python,
    "torchrun": _torchrun,
    "bash": _bash,
    "pip": _pip,
}


def _run_module(name: str, arguments: list[str], world_size: int | None) -> str | None:
    if name == "torch.distributed.run":
        return _torchrun(arguments)
    if name == "pip":
        return _pip(arguments)
    if not name.startswith(("megatron_opdlm", "tests", "tools")):
        return None if importlib.util.find_spec(name.split(".")[0]) else f"there is no module {name}"
    file = ROOT / (name.replace(".", "/") + ".py")
    return _run_file(file, arguments, world_size) if file.is_file() else f"there is no module {name}"


def _run_file(file: Path, arguments: list[str], world_size: int | None) -> str | None:
    """Starts the program with its arguments and stops it when it has read them."""
    file = ROOT / file
    if not file.is_file():
        return f"there is no {file.relative_to(ROOT)}"
    if not READS_FLAGS.search(file.read_text(encoding="utf-8")):
        return None
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "path", [str(file.parent), *sys.path]))
        stack.enter_context(mock.patch.object(sys, "argv", [str(file), *_with_recipes(arguments)]))
        stack.enter_context(_stopping_when_parsed(_names_absent_recipe(arguments), world_size))
        return _quietly(lambda: _load(file).main())[1]


def _load(file: Path) -> object:
    spec = importlib.util.spec_from_file_location(f"documented_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {spec.name: module}):  # where its dataclasses look for their annotations
        spec.loader.exec_module(module)
    return module


def _quietly(program: Callable[[], object]) -> tuple[object, str | None]:
    """(what the program returns, what it says when it ends with an error)."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return program(), None
    except Parsed:
        return None, None
    except SystemExit as ended:
        return None, (said.getvalue().strip().splitlines() or [""])[-1] if ended.code else None


@contextlib.contextmanager
def _stopping_when_parsed(is_partial: bool, world_size: int | None) -> Iterator[None]:
    """Ends a program by `Parsed` when it has read its flags and, where it has settings, checked those.

    A parser that leaves arguments over leaves them for settings: such a program goes on to `load_config`, or to the
    check of its layout.
    """
    parse_args, parse_known_args = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args
    load_config = load.load_config

    def strict(parser, *given, **named):
        if isinstance(parser, jsonargparse.ArgumentParser):
            return parse_args(parser, *given, **named)
        _, rest = parse_known_args(parser, *given, **named)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed

    def check_processes(parallel, _):
        if world_size is not None and not is_partial:
            check_layout(parallel, world_size)
        raise Parsed

    def check_required(config, names):
        if not is_partial:
            required.check_required(config, names)
        check_processes(config.parallel, None)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", strict),
        mock.patch.object(load, "check_required", check_required),
        mock.patch.object(check, "check_layout", check_processes),
        mock.patch.object(required, "_check_files", lambda *_: None),
        mock.patch.object(required, "_check_folder", lambda *_: None),
        mock.patch.multiple(of_generate, **READS_FOLDERS),
    ):
        assert load.load_config is load_config, "programs import this very function"
        yield


def _recipes(arguments: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(place, file) of each value of --config."""
    for place, argument in enumerate(arguments[:-1]):
        if argument == "--config":
            yield place + 1, arguments[place + 1]


def _names_absent_recipe(arguments: Sequence[str]) -> bool:
    return any(not (ROOT / file).is_file() for _, file in _recipes(arguments))


def _with_recipes(arguments: list[str]) -> list[str]:
    """The arguments with the quickstart's recipe for one of the reader's own, which names the models too."""
    stands_in = dict(_recipes(arguments))
    words = [
        str(ROOT / argument if (ROOT / argument).is_file() else ROOT / "examples/quickstart/recipe.yaml")
        if place in stands_in
        else argument
        for place, argument in enumerate(arguments)
    ]
    own = [place for place, file in stands_in.items() if not (ROOT / file).is_file()]
    return words if not own else [*words[: own[-1] + 1], "--config", str(OWN_MODELS), *words[own[-1] + 1 :]]


def in_root() -> contextlib.AbstractContextManager:
    """Commands are meant to be given at the top of the repository."""
    return contextlib.chdir(os.fspath(ROOT))
