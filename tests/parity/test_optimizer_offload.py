"""Main parameters and moments in host memory get the updates that they get elsewhere, and resume exactly.

The optimizer that Megatron splits over GPU and CPU runs for real. What it takes for a GPU here is the CPU too: a tensor
counts as one of the GPU's unless it, or what it was made from, went through `.cpu()`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_opdlm.config.schema import Config, OptimizerConfig, ParallelConfig, PrecisionConfig
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, load_student, tiny_config

FRACTIONS = [0.5, 1.0]
NUM_STEPS = 6


class HostTensor(torch.Tensor):
    """A tensor that is on the host beside tensors of a pretended GPU; so is what is computed from it."""

    def __reduce_ex__(self, protocol):
        """A file holds plain tensors."""
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


@pytest.fixture
def pretended_gpu(monkeypatch, world_of_one):
    from megatron.core.optimizer import optimizer_config

    from megatron_opdlm.training import optimizer

    to = torch.Tensor.to

    def moved_to(tensor, *arguments, **options):
        if arguments in (("cuda",), ("cpu",)):
            return tensor.as_subclass(torch.Tensor if arguments == ("cuda",) else HostTensor)
        return to(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: not isinstance(tensor, HostTensor)))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.detach().clone().as_subclass(HostTensor))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "to", moved_to)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(optimizer, "device", lambda: torch.device("cuda"))
    # Megatron asks for its version alone.
    monkeypatch.setattr(optimizer, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda version: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("hf") / "student", seed=1)


def config_of(folder: Path, fraction: float) -> Config:
    settings = OptimizerConfig(
        lr=1e-2, min_lr=1e-3, lr_warmup_steps=2, weight_decay=0.1, cpu_offload_fraction=fraction, adam_beta2=0.9
    )
    return dataclasses.replace(tiny_config(folder, optimizer=settings), precision=PrecisionConfig(dtype="bfloat16"))


def make_student(config: Config, groups):
    from megatron_opdlm.training.optimizer import make_trainable

    model, _ = load_student(config, groups)
    return make_trainable(model, config.optimizer, config.parallel, NUM_STEPS)


def take_steps(student, steps: range) -> list[float]:
    """Steps with gradients that depend on the number of the step alone; their norms."""
    from megatron_opdlm.training.optimizer import optimizer_step, wait_for_weights

    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in student.model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) * (1 + step))
        norms.append(optimizer_step(student))
        wait_for_weights(student)
    return norms


def main_parameters(student) -> dict[str, torch.Tensor]:
    """Float32 main parameters by name, with their moments behind them."""
    (part,) = student.optimizer.chained_optimizers
    states = {
        name: part._get_main_param_and_optimizer_states(parameter)
        for name, parameter in student.model.named_parameters()
    }
    keys = ("param", "exp_avg", "exp_avg_sq")
    return {name: torch.stack([state[key].as_subclass(torch.Tensor) for key in keys]) for name, state in states.items()}


def share_on_host(student) -> float:
    (part,) = student.optimizer.chained_optimizers
    moments = [state["exp_avg"] for state in part.optimizer.state.values()]
    on_host = sum(moment.numel() for moment in moments if isinstance(moment, HostTensor))
    return on_host / sum(moment.numel() for moment in moments)


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensors in expected.items():
        torch.testing.assert_close(actual[name], tensors, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_offloaded_parameters_get_the_same_updates(pretended_gpu, folder, fraction):
    with layout(ParallelConfig()) as groups:
        plain = make_student(config_of(folder, 0.0), groups)
        start = {name: parameter.detach().clone() for name, parameter in plain.model.named_parameters()}
        norms = take_steps(plain, range(NUM_STEPS))
        offloaded = make_student(config_of(folder, fraction), groups)
        assert take_steps(offloaded, range(NUM_STEPS)) == pytest.approx(norms, rel=1e-6)
    assert share_on_host(plain) == 0
    assert fraction <= share_on_host(offloaded) <= fraction + 0.3
    assert_close(main_parameters(offloaded), main_parameters(plain))
    for name, parameter in offloaded.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        main = main_parameters(offloaded)[name][0].view(parameter.shape)
        assert parameter.equal(main.bfloat16()), "the weights are the main parameters, rounded"
        assert not parameter.equal(start[name])


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.5), (1.0, 1.0), (0.5, 0.0), (0.0, 0.5), (1.0, 0.5)])
def test_a_run_goes_on_from_a_checkpoint_under_this_and_other_fractions(pretended_gpu, folder, tmp_path, before, after):
    from megatron_opdlm.checkpointing.distributed import save_checkpoint
    from megatron_opdlm.checkpointing.student_and_teacher import open_student
    from megatron_opdlm.checkpointing.train_state import load_train_state, save_train_state

    config = config_of(folder, before)
    with layout(ParallelConfig()) as groups:
        first = make_student(config, groups)
        take_steps(first, range(3))
        saved = {name: parameter.detach().clone() for name, parameter in first.model.named_parameters()}
        progress = {"scheduler": first.scheduler.state_dict()}
        source, checkpoint = open_student(config.student), tmp_path / "checkpoints/step_00000003"
        save_train_state(save_checkpoint, checkpoint, first.model, first.optimizer, groups, progress, source, config)
        take_steps(first, range(3, NUM_STEPS))
        second = make_student(config_of(folder, after), groups)
        loaded = load_train_state(checkpoint, second.model, second.optimizer, groups)
        second.scheduler.load_state_dict(loaded["scheduler"])
        for name, parameter in second.model.named_parameters():
            assert parameter.equal(saved[name]), name
        take_steps(second, range(3, NUM_STEPS))
    assert_close(main_parameters(second), main_parameters(first))


def test_a_machine_without_a_gpu_or_without_transformer_engine_is_refused(world_of_one, folder, monkeypatch):
    from megatron_opdlm.training import optimizer

    with layout(ParallelConfig()) as groups:
        for expected in ("must be 0 without a GPU", "needs Transformer Engine"):
            with pytest.raises(ValueError, match=rf"optimizer.cpu_offload_fraction \(0.5\) {expected}"):
                make_student(config_of(folder, 0.5), groups)
            monkeypatch.setattr(optimizer, "device", lambda: torch.device("cuda"))
