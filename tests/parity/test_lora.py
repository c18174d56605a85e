"""Adapters against a plain reimplementation: float64 matrices added to the weights of `transformers`, and autograd.

Also what surrounds them: the student's own weights stay as they are, the rollout has the adapters, a checkpoint holds
nothing else and is gone on from exactly, and the export is the sum that one would write down.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_opdlm.config.load import save_config
from megatron_opdlm.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    StudentConfig,
    TrainingConfig,
)
from tests.parity.test_gradients import literal_gradients, roll_out_states
from tests.references import load_reference
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, run_trainer, tiny_config

RANK, ALPHA = 3, 6.0
ALL_MODULES = LoraConfig().target_modules
CASES = {
    "all modules": {},
    "recompute": {"recompute": "full"},
    "recompute, of the MLP alone, tied": {"recompute": "full", "modules": ["linear_fc1", "linear_fc2"], "tie": True},
    "attention's output alone": {"modules": ["linear_proj"]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    make_tiny_qwen3(root / "untied", seed=1)
    make_tiny_qwen3(root / "tied", seed=2, tie=True)
    make_tiny_qwen3(root / "teacher", seed=3, num_layers=1)
    write_prompts(root / "prompts.jsonl", 9)
    return root


def lora_config(root: Path, directory: Path, *, modules=None, tie=False, recompute="none", max_steps=3) -> Config:
    config = tiny_config(
        root / ("tied" if tie else "untied"),
        teacher=root / "teacher",
        backend="aten",
        rollout=RolloutConfig(max_new_tokens=8, dynamic_threshold=0.12, stop_token_ids=[5]),
        data=DataConfig(train_files=[str(root / "prompts.jsonl")]),
        optimizer=OptimizerConfig(lr=2e-2, min_lr=2e-3, lr_warmup_steps=1, lr_decay_steps=20),
        training=TrainingConfig(
            max_steps=max_steps,
            num_prompts_per_step=4,
            global_batch_size=4,
            micro_batch_size=2,
            pad_to_multiple=8,
            recompute=recompute,
        ),
        checkpoint=CheckpointConfig(save_interval=0),
        logging=LoggingConfig(directory=str(directory), tensorboard=False, progress_bar=False),
    )
    return dataclasses.replace(config, lora=LoraConfig(rank=RANK, alpha=ALPHA, target_modules=modules or ALL_MODULES))


def adapters_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(("lora_a", "lora_b"))}


def merged_by_hand(model, architecture) -> dict[str, torch.Tensor]:
    """The Hugging Face weights that the adapters change, in the adapters' number format, differentiable in them."""
    from megatron_opdlm.checkpointing.hf_qwen3 import LAYER

    merged, parameters = {}, dict(model)
    for name in [name for name in parameters if name.endswith("lora_a")]:
        module = name.removesuffix(".lora_a")  # decoder.layers.0.mlp.linear_fc1
        a, b = parameters[name], parameters[f"{module}.lora_b"]
        whole = parameters[f"{module}.base.weight"].to(a.dtype) + ALPHA / RANK * (b @ a)
        _, _, index, parameter = f"{module}.weight".split(".", 3)
        for hf, tensor in LAYER[parameter][1].to_hf(whole, architecture).items():
            merged[f"model.layers.{index}.{hf}"] = tensor
    return merged


class PlainStudent:
    """The student of `transformers` with matrices added to its weights."""

    def __init__(self, folder: Path, model, architecture) -> None:
        self.model = load_reference(folder).requires_grad_(False)
        self.dtype, self.architecture = self.model.dtype, architecture
        self.parameters = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
        for tensor in self.named_parameters():
            tensor[1].requires_grad_()

    def named_parameters(self) -> list[tuple[str, torch.Tensor]]:
        return [item for item in self.parameters.items() if item[0].endswith(("lora_a", "lora_b"))]

    def zero_grad(self) -> None: ...

    def __call__(self, **inputs):
        return torch.func.functional_call(self.model, merged_by_hand(self.parameters, self.architecture), (), inputs)


def draw_adapters(model) -> None:
    """B is zero at the start, and then A has no gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters_of(model).values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_matrices_added_to_the_weights_of_transformers(root, world_of_one, tmp_path, case):
    from megatron_opdlm.training.trainer import Trainer

    config = lora_config(root, tmp_path / "run", **CASES[case])
    optimizer = OptimizerConfig(lr=1e-12, min_lr=0.0, clip_grad=0.0)
    with layout(ParallelConfig()):
        trainer = Trainer(dataclasses.replace(config, optimizer=optimizer))
        model, architecture = trainer.student.model, trainer.source.architecture
        draw_adapters(model)
        states = roll_out_states(trainer)
        folder = root / ("tied" if CASES[case].get("tie") else "untied")
        expected, loss = literal_gradients(
            PlainStudent(folder, model, architecture), load_reference(root / "teacher"), states, trainer.special
        )
        (micro_batches,) = trainer._global_batches(states)
        sums = trainer.train_step(micro_batches)
        assert sums["loss"] / sums["loss_count"] == pytest.approx(loss, rel=1e-5)
        assert sums["on_policy_gap"] / sums["committed_tokens"] < 1e-5, "the rollout has the adapters too"
        actual = adapters_of(model)
        assert actual.keys() == expected.keys() and len(actual) == 4 * len(config.lora.target_modules)
        for name, gradient in expected.items():
            assert (actual[name].main_grad - gradient).norm() <= 1e-5 * gradient.norm(), name
        norm = sum(float(gradient.square().sum()) for gradient in expected.values()) ** 0.5
        assert sums["grad_norm"] == pytest.approx(norm, rel=1e-5)
        others = set(dict(model.named_parameters())) - actual.keys()
        assert not any(dict(model.named_parameters())[name].requires_grad for name in others)


def test_at_the_start_adapters_change_nothing(root, world_of_one, tmp_path):
    from megatron_opdlm.training.trainer import Trainer

    trajectories = []
    for lora in (LoraConfig(), LoraConfig(rank=RANK)):
        config = dataclasses.replace(lora_config(root, tmp_path / "run"), lora=lora)
        with layout(ParallelConfig()):
            trainer = Trainer(config)
            made = trainer.engine.generate(trainer._tasks(trainer.prompt_stream.next_batch(), 8), 0)
            trajectories.append([trajectory.to_json() for trajectory in made])
    assert trajectories[0] == trajectories[1]


@pytest.fixture(scope="module")
def trained(root, world_of_one) -> Path:
    """The run directory of three steps."""
    with layout(ParallelConfig()):
        run_trainer(lora_config(root, root / "run"))
    return root / "run"


def test_a_checkpoint_holds_the_adapters_and_their_optimizer_state_alone(root, trained):
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(trained / "checkpoints" / "step_00000003").read_metadata().state_dict_metadata
    weights = {key for key in stored if not key.startswith("optimizer.")}
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    expected = {f"decoder.layers.{module}.{name}" for module in modules for name in ("lora_a", "lora_b")}
    assert {key for key in weights if "layers" in key} == expected
    assert not any("embedding" in key or "base" in key for key in stored)
    assert tuple(stored["decoder.layers.mlp.linear_fc1.lora_b"].size) == (2, 96, RANK)


def test_a_run_that_was_stopped_goes_on_exactly(root, trained, tmp_path):
    with layout(ParallelConfig()):
        first = run_trainer(lora_config(root, tmp_path / "stopped", max_steps=1))[0]
        then = run_trainer(lora_config(root, tmp_path / "stopped"))[0]
    assert len(first) == 1 and len(then) == 2
    expected, actual = exported(trained, tmp_path / "whole"), exported(tmp_path / "stopped", tmp_path / "resumed")
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


def exported(run: Path, output: Path, dtype: str | None = None) -> dict[str, torch.Tensor]:
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    megatron_to_hf(run / "checkpoints", output, dtype=dtype)
    return load_file(output / "model.safetensors")


def test_the_export_is_the_sum_by_hand_and_leaves_the_other_weights_alone(root, trained, tmp_path):
    from megatron_opdlm.training.trainer import Trainer

    with layout(ParallelConfig()):
        trainer = Trainer(lora_config(root, trained))  # goes on from the last step
        by_hand = merged_by_hand(dict(trainer.student.model.named_parameters()), trainer.source.architecture)
    actual, start = exported(trained, tmp_path / "export"), load_file(root / "untied" / "model.safetensors")
    assert actual.keys() == start.keys() and len(by_hand) == 2 * 7
    for name, weight in actual.items():
        if name in by_hand:
            assert torch.equal(weight, by_hand[name]), "bit for bit in float32"
            assert (weight - start[name]).norm() > 1e-3 * start[name].norm(), name
        else:
            assert torch.equal(weight[: len(start[name])], start[name]), name


def test_the_export_has_the_logits_of_the_adapted_model(root, trained, tmp_path):
    from megatron_opdlm.training.trainer import Trainer
    from tests.parity.test_on_policy_invariant import training_logits
    from tests.references import two_stream_logits

    exported(trained, tmp_path / "export")
    clean_BT = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(1))
    lengths_B = torch.tensor([16, 12])
    with layout(ParallelConfig()):
        trainer = Trainer(lora_config(root, trained))
        noisy_BT = clean_BT.masked_fill(torch.arange(16) % 4 > 1, trainer.special.mask_token_id)
        logits_BTV = training_logits(trainer.student.model, clean_BT, noisy_BT, lengths_B, trainer.config.rollout)
    model = load_reference(tmp_path / "export", dtype=torch.float32)
    with torch.no_grad():
        expected_BTV = two_stream_logits(model, clean_BT, noisy_BT, lengths_B, 4)[1]
    is_real = torch.arange(16) < lengths_B[:, None]
    assert (logits_BTV[..., : expected_BTV.shape[-1]] - expected_BTV)[is_real].abs().max() <= 1e-5


def test_adapters_of_a_megatron_checkpoint_are_merged_likewise(root, trained, tmp_path):
    from megatron_opdlm.checkpointing.conversion import hf_to_megatron, megatron_to_hf

    hf_to_megatron(str(root / "untied"), tmp_path / "base", role="student", dtype=None, mask_token="<|MASK|>")
    config = dataclasses.replace(lora_config(root, trained), student=StudentConfig(checkpoint=str(tmp_path / "base")))
    copy = tmp_path / "copy"
    shutil.copytree(trained / "checkpoints" / "step_00000003", copy)
    replace_config(copy, config)
    megatron_to_hf(copy, tmp_path / "export", dtype=None)
    actual, expected = load_file(tmp_path / "export" / "model.safetensors"), exported(trained, tmp_path / "other")
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


def replace_config(checkpoint: Path, config: Config) -> None:
    """Under the manifest that knows the size of every file."""
    from megatron_opdlm.checkpointing.folders import publish
    from megatron_opdlm.checkpointing.manifest import MANIFEST

    (checkpoint / MANIFEST).unlink()
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    checkpoint.rename(partial)
    save_config(config, partial / "config.yaml")
    publish(partial)


def test_adapters_without_their_model_are_refused_by_name(root, trained, tmp_path, world_of_one):
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf
    from megatron_opdlm.training.trainer import Trainer

    config = lora_config(root, tmp_path / "run")
    whole = dataclasses.replace(
        config, student=StudentConfig(checkpoint=str(trained / "checkpoints")), lora=LoraConfig()
    )
    with (
        layout(ParallelConfig()),
        pytest.raises(ValueError, match="holds the adapters of a LoRA run, not whole weights"),
    ):
        Trainer(whole)
    copy = tmp_path / "copy"
    shutil.copytree(trained / "checkpoints" / "step_00000003", copy)
    replace_config(copy, dataclasses.replace(config, student=StudentConfig(hf=str(root / "gone"))))
    with pytest.raises(
        ValueError, match=r"student.hf in .*config.yaml, to whose weights these adapters belong, \(.*gone"
    ):
        megatron_to_hf(copy, tmp_path / "export", dtype=None)
    assert not (tmp_path / "export").exists()


def test_what_a_model_cannot_have_is_refused_in_a_sentence():
    from megatron_opdlm.models.lora import check_lora
    from megatron_opdlm.models.qwen3 import Mixture
    from tests.unit.test_pipeline_settings import ARCHITECTURE

    with pytest.raises(ValueError, match=r"lora.rank \(4\) needs student.transformer.transformer_impl \(transformer_e"):
        check_lora(LoraConfig(rank=4), ARCHITECTURE, transformer_impl="transformer_engine")
    mixture = Mixture(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True)
    experts = dataclasses.replace(ARCHITECTURE, mixture=mixture)
    with pytest.raises(ValueError, match="must not have linear_fc1 in a mixture of experts"):
        check_lora(LoraConfig(rank=4), experts, transformer_impl="local")
    attention = LoraConfig(rank=4, target_modules=["linear_qkv", "linear_proj"])
    check_lora(attention, experts, transformer_impl="local")
    check_lora(LoraConfig(), experts, transformer_impl="transformer_engine")
