"""The report of versions."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

from megatron_opdlm import __version__
from megatron_opdlm.versions import devices, main, versions


def test_it_has_what_pip_knows_and_the_cuda_of_torch():
    found = versions()
    assert found["megatron-opdlm"] == __version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["megatron-core"] == importlib.metadata.version("megatron-core")
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["cuda of torch"] == (torch.version.cuda or "none")


def test_a_part_that_is_missing_is_none_and_can_be_required(monkeypatch, capsys):
    def version(name: str) -> str:
        if name == "apex":
            raise importlib.metadata.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    main(["--require", "torch"])
    assert "apex                none\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--require", "torch", "apex"])
    assert stop.value.code == 2 and "not installed: apex" in capsys.readouterr().err


def test_json_is_one_object(capsys):
    main(["--json", "--devices"])
    assert json.loads(capsys.readouterr().out) == versions() | devices()


def test_it_answers_without_importing_torch():
    code = "import sys; from megatron_opdlm.versions import main; main([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says how it is without a GPU")
def test_without_a_gpu_it_says_so():
    assert devices() == {"gpus": "none"}
