"""The CPU seam: Megatron's CUDA calls land on the CPU, other libraries notice nothing, a GPU machine is left alone."""

from __future__ import annotations

import subprocess
import sys

import torch

import megatron_opdlm.parallel
from megatron_opdlm.parallel import cpu


def test_a_factory_asked_for_cuda_answers_on_the_cpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"


def test_float_tensors_name_the_type_that_megatrons_optimizers_look_for():
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.float64).dtype is torch.float64


def test_a_device_context_still_reaches_the_patched_factories():
    # transformers builds its models under torch.device("meta"); without this their RoPE frequencies are garbage
    with torch.device("meta"):
        assert torch.arange(3).device.type == "meta"
        assert torch.empty(3).device.type == "meta"


def test_installing_twice_changes_nothing():
    before = torch.zeros
    assert cpu.install()
    assert torch.zeros is before


def test_a_machine_with_a_gpu_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    before = (torch.zeros, torch.Tensor.cuda, torch.cuda.Stream)
    assert not cpu.install()
    assert (torch.zeros, torch.Tensor.cuda, torch.cuda.Stream) == before
    assert torch.cuda.current_device() == 0


def test_the_package_installs_the_seam_when_it_is_imported():
    assert megatron_opdlm.parallel.cpu.install()
    assert torch.cuda.current_device() == torch.device("cpu")


def test_functions_run_uncompiled():
    def function():
        raise AssertionError("never called")

    assert torch.compile(function) is function
    assert torch.compile(dynamic=False, fullgraph=True)(function) is function


def test_importing_all_of_megatron_that_training_needs_leaves_the_compiler_alone():
    """To import it takes as long as to import torch."""
    program = "import sys, megatron_opdlm.training.trainer; print({'torch._dynamo'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
