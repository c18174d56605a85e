"""What the pages say is there, is there: links, modules, settings, error messages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from megatron_opdlm.config.settings import SECTIONS, SETTINGS
from megatron_opdlm.data.preparation.prepare import shard_names
from tests.documented_commands import ROOT, pages

PACKAGE = ROOT / "megatron_opdlm"
PACKAGES = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)", re.DOTALL)
TROUBLESHOOTING = PACKAGE / "TROUBLESHOOTING.md"


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(prose(page)):
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        if re.match(r"[a-z]+:", target):
            continue
        if not other.exists() or (anchor and anchor not in headings(other)):
            broken.append(target)
    return broken


def unknown_settings(page: Path) -> list[str]:
    """Names in a last column, or in prose, that have a section of ours but are no setting."""
    ours = [line.rpartition(" | ")[2] for line in prose(page).splitlines() if not line.startswith("| there")]
    dotted = re.findall(r"`((?:--)?[a-z_]+\.[a-z_0-9.]+)`", "\n".join(ours))
    names = [name.removeprefix("--") for name in dotted]
    return [name for name in names if name.split(".")[0] in SECTIONS and name not in SETTINGS]


def unresolved_imports(page: Path) -> list[str]:
    """The names that a page's Python examples import from us, and that are not there."""
    absent = []
    for example in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("megatron_opdlm"):
                file = ROOT / (node.module.replace(".", "/") + ".py")
                known = set(re.findall(r"\w+", file.read_text(encoding="utf-8"))) if file.is_file() else set()
                absent += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in known]
    return absent


def messages() -> str:
    """The sources of all programs, with texts that go over several lines in one."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text(encoding="utf-8") for file in files))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_import_what_is_there(page):
    assert unresolved_imports(page) == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_every_package_has_a_page_whose_table_names_modules_that_exist(package):
    text = (package / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^\| module .*?\n\n", text + "\n\n", re.DOTALL | re.MULTILINE)
    cells = [line.split("|")[1] for line in table[0].splitlines()[2:] if line] if table else []
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert [name for name in named if not (package / f"{name}.py").is_file() and not (package / name).is_dir()] == []


@pytest.mark.parametrize("page", [PACKAGE / "COMING_FROM_OPDLM.md", TROUBLESHOOTING, ROOT / "examples/TUTORIAL.md"])
def test_settings_that_a_page_names_exist(page):
    assert unknown_settings(page) == []


def test_every_setting_of_the_public_implementation_stands_in_one_row_of_its_table():
    text = (PACKAGE / "COMING_FROM_OPDLM.md").read_text(encoding="utf-8").split("## Training")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    theirs = [name for row in rows for name in re.findall(r"`([a-z_]+\.[A-Za-z_.0-9]+)`", row)]
    assert len(theirs) == len(set(theirs)) == 123  # the leaves of its rl_bd3lm.yaml, the caps per domain as one


def test_the_tutorial_trains_on_the_shards_that_its_preparation_leaves():
    text = (ROOT / "examples/TUTORIAL.md").read_text(encoding="utf-8")
    rows_per_shard = int(re.search(r"--rows-per-shard (\d+)", text)[1])
    for num_rows in (50_000, 61_816):  # of the mix; some are dropped
        shards = {name for name, _ in shard_names(num_rows, rows_per_shard)}
        assert set(re.findall(r"prompts-\d+-of-\d+\.parquet", text)) == shards


def test_messages_that_are_explained_exist():
    cells = [line.split(" | ")[0] for line in prose(TROUBLESHOOTING).splitlines() if line.startswith("| ")]
    quoted = [text for cell in cells for text in re.findall(r"`([^`]* [^`]*)`", cell)]
    assert len(quoted) > 30
    known = messages()
    pieces = [piece.strip(" :,().") for text in quoted for piece in text.split("...")]
    assert [piece for piece in pieces if len(piece) > 12 and piece not in known] == []


def test_these_checks_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b\n[x](nowhere.md) [y](#a-b) [z](#c) [w](https://a.b)\n`rollout.block_sise`, `a.b`\n")
    assert broken_links(page) == ["nowhere.md", "#c"]
    assert unknown_settings(page) == ["rollout.block_sise"]
    page.write_text("```python\nfrom megatron_opdlm.config.load import load_config, lode\n```\n")
    assert unresolved_imports(page) == ["megatron_opdlm.config.load.lode"]
