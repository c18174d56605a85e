"""The layers of the package hold: a module imports only lower ones, and one file alone patches other libraries."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_opdlm"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Lowest first. Packages on one line are siblings, which do not import each other.
LAYERS = [
    "config",
    "observability",
    "planning",
    "diffusion data",
    "parallel",
    "models",
    "checkpointing rollout distillation",
    "objectives",
    "evaluation export",
    "training terminal",
]
HEIGHT = {package: height for height, line in enumerate(LAYERS) for package in line.split()}


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name in this module, full dotted name) of each import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name.split(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def upward_imports(package: str, source: str) -> list[str]:
    """The imports by which a module of `package` reaches a sibling or a higher layer."""
    own = [name.split(".")[1] for _, name in imports(ast.parse(source)) if name.startswith("megatron_opdlm.")]
    # anything without a height (an entry point) lies above all layers
    return [other for other in own if other != package and HEIGHT.get(other, len(LAYERS)) >= HEIGHT[package]]


def patches(source: str) -> list[str]:
    """The assignments and setattr calls that change a module or class of torch or Megatron-Core."""
    tree = ast.parse(source)
    foreign = {name for name, full in imports(tree) if full.split(".")[0] in ("torch", "megatron")}
    changed = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            changed += [target for target in node.targets if isinstance(target, ast.Attribute)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            changed.append(node.args[0])
    return [ast.unparse(target) for target in changed if ast.unparse(target).split(".")[0] in foreign]


@pytest.mark.parametrize("package", sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()))
def test_a_module_imports_only_lower_layers(package):
    found = {path.name: upward_imports(package, path.read_text()) for path in (PACKAGE / package).rglob("*.py")}
    assert {name: upward for name, upward in found.items() if upward} == {}


def test_only_the_cpu_seam_patches_other_libraries():
    patching = {str(path.relative_to(PACKAGE)) for path in MODULES if patches(path.read_text())}
    assert patching == {"parallel/cpu.py"}


@pytest.mark.parametrize(
    ("package", "unwanted"), [("config", "torch"), ("planning", "torch"), ("diffusion", "megatron")]
)
def test_the_lowest_layers_do_without_heavy_libraries(package, unwanted):
    for path in (PACKAGE / package).rglob("*.py"):
        assert unwanted not in {full.split(".")[0] for _, full in imports(ast.parse(path.read_text()))}, path.name


def test_these_checks_can_fail():
    assert upward_imports("models", "def f():\n    from megatron_opdlm.rollout.engine import x") == ["rollout"]
    assert upward_imports("rollout", "import megatron_opdlm.distillation.loss") == ["distillation"]
    assert upward_imports("training", "from megatron_opdlm.train import main") == ["train"]
    assert upward_imports("training", "from megatron_opdlm.models import build") == []
    assert patches("import torch\ntorch.Tensor.cuda = None\nsetattr(torch, 'ones', 1)") == [
        "torch.Tensor.cuda",
        "torch",
    ]
    assert patches("from megatron.core import random as r\nr.seed = 1\nself.x = r.seed") == ["r.seed"]
