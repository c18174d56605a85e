"""Dockerfile and Dockerfile.cpu as far as they can be checked without a container engine."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
IMAGES = ["Dockerfile", "Dockerfile.cpu"]
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def instructions(image: str) -> list[tuple[str, str]]:
    """(COPY, the rest of the line) and so on, with continued lines joined and comments left out."""
    lines = [line for line in (ROOT / image).read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def values(image: str, instruction: str) -> list[str]:
    return [rest for name, rest in instructions(image) if name == instruction]


def requirements(name: str) -> dict[str, Requirement]:
    """By name, of one file of requirements/ and those that it includes."""
    found = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found |= requirements(line.removeprefix("-r "))
        elif line:
            found[Requirement(line).name] = Requirement(line)
    return found


@pytest.mark.parametrize("image", IMAGES)
def test_everything_that_is_copied_exists_and_is_not_ignored(image):
    copied = [word for rest in values(image, "COPY") for word in rest.split()[:-1] if not word.startswith("--")]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch.fnmatch(source, pattern) for pattern in IGNORED), source


@pytest.mark.parametrize("image", IMAGES)
def test_every_list_of_requirements_exists_and_is_copied_before_it_is_read(image):
    seen, read = [], 0
    for name, rest in instructions(image):
        if name == "COPY":
            seen += rest.split()[:-1]
        for wanted in re.findall(r"--requirement (\S+)", rest):
            assert any(wanted == source or wanted.startswith(f"{source}/") for source in seen), wanted
            assert requirements(Path(wanted).name)
            read += 1
    assert read == {"Dockerfile": 1, "Dockerfile.cpu": 3}[image]


@pytest.mark.parametrize("image", IMAGES)
def test_the_base_is_one_release_and_what_runs_is_no_root(image):
    (base,) = [rest.split("=", 1)[1] for rest in values(image, "ARG") if rest.startswith("BASE_IMAGE=")]
    assert re.fullmatch(r"(nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3|python:3\.11\.\d+-slim-[a-z]+)", base), base
    assert values(image, "FROM") == ["${BASE_IMAGE}"]
    assert values(image, "USER") == ["${USER_ID}"] and "USER_ID=1000" in values(image, "ARG")


@pytest.mark.parametrize("image", IMAGES)
def test_every_argument_of_the_build_is_documented(image):
    comments = "\n".join(line for line in (ROOT / image).read_text().splitlines() if line.startswith("#"))
    for argument in values(image, "ARG"):
        assert argument.split("=")[0] in comments


@pytest.mark.parametrize("image", IMAGES)
def test_what_starts_first_says_the_versions_and_gets_the_command(image):
    (entrypoint,) = values(image, "ENTRYPOINT")
    script = re.search(r'"/opt/megatron_opdlm/(launch/\S+)"', entrypoint)[1]
    text = (ROOT / script).read_text()
    assert text.index("python -m megatron_opdlm.versions --devices") < text.index('exec "$@"')


def test_the_gpu_image_has_the_second_lanes_versions_and_those_that_the_package_asks_for():
    image, lane = requirements("ngc.txt"), requirements("latest.txt")
    pinned = {name: wanted for name, wanted in image.items() if wanted.specifier}
    assert set(pinned) >= {"megatron-core", "transformers", "jsonargparse", "datasets", "safetensors"}
    assert {name: wanted.specifier for name, wanted in pinned.items()} == {
        name: lane[name].specifier for name in pinned
    }
    setup = (ROOT / "setup.py").read_text()
    needed = re.findall(r'^        "([^"]+)",', setup[setup.index("install_requires") :].split("]")[0], re.MULTILINE)
    asked = [Requirement(line) for line in needed]
    assert {wanted.name for wanted in asked} - set(image) == {"torch"}, "which is the image's"
    (megatron,) = [wanted for wanted in asked if wanted.name == "megatron-core"]
    assert next(iter(pinned["megatron-core"].specifier)).version in megatron.specifier


@pytest.mark.parametrize(("extras", "installed"), [("", "."), ("eval", ".[eval]"), ("eval,wandb", ".[eval,wandb]")])
def test_the_gpu_image_installs_the_package_with_the_extras_asked_for_or_none(extras, installed):
    (command,) = [rest for rest in values("Dockerfile", "RUN") if "--editable" in rest]
    shell = f'EXTRAS="{extras}"; printf %s {command.split("--editable")[1]}'
    assert subprocess.run(["bash", "-c", shell], capture_output=True, text=True).stdout == installed  # pip: no `.[]`


def test_the_gpu_image_holds_what_was_compiled_together():
    (command,) = [rest for rest in values("Dockerfile", "RUN") if "pip list" in rest]
    pattern = re.compile(re.search(r"'(\^.*==)'", command)[1], re.IGNORECASE)
    shipped = "torch==2.13.0a0+8145d630e8.nv26.06 transformer_engine==2.16.0 flash_attn==2.7.4 apex==0.1 numpy==2.1.0"
    assert all(pattern.match(line) for line in shipped.split())
    assert not any(pattern.match(line) for line in ["PyYAML==6.0.1", "tqdm==4.67.1", "torchtitan==1.0"])
    assert "PIP_CONSTRAINT=/opt/opdlm_constraint.txt" in values("Dockerfile", "ENV")
    assert command.strip().endswith("> /opt/opdlm_constraint.txt")
