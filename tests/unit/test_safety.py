"""What the project promises in SECURITY.md, as far as reading its sources can tell."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_opdlm.config.load import save_config
from megatron_opdlm.config.schema import Config

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("megatron_opdlm", "tools", "examples") for path in (ROOT / folder).rglob("*.py"))
CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "makes code of text",
    "__import__": "imports by a computed name",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "pickle.load": "unpickles",
    "pickle.loads": "unpickles",
    "marshal.loads": "unpickles",
    "yaml.load": "makes objects of YAML",
    "yaml.unsafe_load": "makes objects of YAML",
    "hf_hub_download": "fetches",
    "snapshot_download": "fetches",
}
ALLOWED = {
    ("megatron_opdlm/rollout/work_queue.py", "pickle.loads"): "what a rank of the same run has sent",
}
"""File and call -> why it is no harm. The evaluation of written programs has a sandbox of its own."""
SANDBOX = ("megatron_opdlm/evaluation/sandbox", "megatron_opdlm/evaluation/inside/", "megatron_opdlm/evaluation/code")


def dangers(source: str) -> Iterator[str]:
    """The calls that run or unpickle what they are given."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in CALLS:
            yield name
        if name == "torch.load" and settings.get("weights_only") != "True":
            yield "torch.load without weights_only"
        if settings.get("trust_remote_code", "False") != "False":
            yield "trust_remote_code"
        if settings.get("shell", "False") != "False":
            yield "a shell"


def test_nothing_runs_or_unpickles_what_comes_from_outside():
    found = {
        (name, danger)
        for path in SOURCES
        if not (name := path.relative_to(ROOT).as_posix()).startswith(SANDBOX)
        for danger in dangers(path.read_text())
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("eval(x)", "eval"),
        ("import pickle\npickle.loads(x)", "pickle.loads"),
        ("torch.load(path)", "torch.load without weights_only"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only"),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", "trust_remote_code"),
        ("AutoModel.from_pretrained(x, trust_remote_code=settings.trust)", "trust_remote_code"),
        ("subprocess.run(command, shell=True)", "a shell"),
    ],
)
def test_this_check_can_fail(source, danger):
    assert list(dangers(source)) == [danger]


@pytest.mark.parametrize("source", ["model.eval()", "torch.load(path, weights_only=True)", "re.compile('x')"])
def test_this_check_can_pass(source):
    assert list(dangers(source)) == []


def test_no_setting_asks_for_a_secret():
    names = [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(section.default_factory())
    ]
    assert len(names) > 100
    assert [name for name in names if re.search(r"secret|password|credential|api_?key|access_?key|auth", name)] == []


def test_a_saved_config_holds_nothing_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "sentinel-0123456789")
    monkeypatch.setenv("HF_TOKEN", "sentinel-0123456789")
    save_config(Config(), tmp_path / "config.yaml")
    assert "sentinel" not in (tmp_path / "config.yaml").read_text()


def test_the_promises_are_written_down():
    text = (ROOT / "SECURITY.md").read_text()
    for words in ("safetensors", "weights_only", "trust_remote_code", "WANDB_API_KEY", "Reporting"):
        assert words in text
