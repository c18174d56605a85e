"""A quantized model rounds in rollout and training alike, and its folder holds what it multiplies with.

The oracle for rounding is PyTorch's own: `torch.float8_e4m3fn`, and round-to-nearest of whole numbers.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from megatron_opdlm.checkpointing.hf_folder import SafetensorsReader, copy_assets
from megatron_opdlm.config.schema import Config, LoraConfig, ParallelConfig, RolloutConfig, TrainingConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.export.quantize import check_quantization, is_quantized, linear_layers, quantize
from megatron_opdlm.export.quantize_calibration import on_policy_calibration
from megatron_opdlm.export.quantize_folder import (
    dequantized_tensors,
    multiplied_tensors,
    quantized_tensors,
    write_quantized_folder,
)
from megatron_opdlm.rollout.engine import RolloutEngine
from tests.tiny_moe import make_tiny_moe
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import gathered_logits, layout, load_student, load_teacher, tiny_config

ROLLOUT = RolloutConfig(max_new_tokens=8, stop_token_ids=[5])
PROMPTS = [Prompt(prompt_id=row, token_ids=tuple(range(1, 4 + row))) for row in range(3)]
LARGEST = {"fp8": 448, "int8": 127}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("hf"), seed=3)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return make_tiny_moe(tmp_path_factory.mktemp("moe"), seed=3)


def config_of(folder, rollout: RolloutConfig = ROLLOUT) -> Config:
    return tiny_config(folder, rollout=rollout, training=TrainingConfig(micro_batch_size=3))


def quantized_student(folder, groups, quantization: str):
    """The student, quantized after three responses, and the calibration."""
    config = config_of(folder)
    model, special = load_student(config, groups)
    calibration = calibrate(model, special, config)
    quantize(model, quantization, lambda: calibration.run(model))
    return model, special, calibration


def calibrate(model, special, config: Config, is_student: bool = True):
    engine = RolloutEngine(model, config.rollout, special, seed=0)
    return on_policy_calibration(engine, PROMPTS, config, special, is_student=is_student)


def architecture_of(folder):
    from megatron_opdlm.checkpointing.student_and_teacher import open_student
    from megatron_opdlm.config.schema import StudentConfig

    return open_student(StudentConfig(hf=str(folder))).architecture


def rounded_by_hand(numbers: torch.Tensor, largest: torch.Tensor, quantization: str) -> torch.Tensor:
    """The numbers, each as the nearest that the format can hold when `largest` is its largest."""
    scale = largest / LARGEST[quantization]
    if quantization == "int8":
        return (numbers / scale).round().clamp(-128, 127) * scale
    return (numbers / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("quantization", LARGEST)
def test_every_linear_layer_multiplies_rounded_inputs_with_a_rounded_weight(folder, world_of_one, quantization):
    with layout(ParallelConfig()) as groups, torch.no_grad():
        model, _, _ = quantized_student(folder, groups, quantization)
        layers, generator = dict(linear_layers(model)), torch.Generator().manual_seed(0)
        assert len(layers) == 2 * 4
        for layer in layers.values():
            input_SBI = torch.randn(5, 1, layer.weight.shape[1], generator=generator)
            by_row = layer.weight.abs().amax(dim=1, keepdim=True)
            largest = by_row if quantization == "int8" else by_row.max()
            expected = F.linear(
                rounded_by_hand(input_SBI, layer.input_quantizer.amax, quantization),
                rounded_by_hand(layer.weight, largest, quantization),
            )
            assert (layer(input_SBI)[0] - expected).abs().max() <= 1e-5
            assert (F.linear(input_SBI, layer.weight) - expected).abs().max() > 1e-3


def test_rollout_and_training_run_the_same_rounded_layers(folder, world_of_one):
    with layout(ParallelConfig()) as groups:
        model, special, _ = quantized_student(folder, groups, "fp8")
        again = calibrate(model, special, config_of(folder))
        (states,) = again.micro_batches
        compared = states.is_committed_BT & states.is_trained_BT
        gaps = {}
        for which in ("rounded", "not rounded"):
            if which == "not rounded":
                for _, layer in linear_layers(model):
                    layer.input_quantizer.disable()
                    layer.weight_quantizer.disable()
            with torch.no_grad():
                hidden = again._hidden(model, states)
                logits_BTV = gathered_logits(model, hidden)[-states.num_rows :, :, : special.vocab_size]
            logits_BTV[..., special.mask_token_id] = -torch.inf
            log_probs_BT = logits_BTV.log_softmax(-1).gather(-1, states.clean_ids_BT[..., None])[..., 0]
            gaps[which] = (log_probs_BT - states.log_probs_BT)[compared].abs()
    assert len(gaps["rounded"]) >= 6
    assert gaps["rounded"].max() <= 1e-4, "the rollout is rounded as the training forward is"
    assert gaps["not rounded"].max() > 1e-2, "and rounding is not nothing"


def test_calibration_sees_the_noisy_stream_and_takes_the_largest_input(folder, world_of_one):
    with layout(ParallelConfig()) as groups:
        config = config_of(folder)
        model, special = load_student(config, groups)
        calibration = calibrate(model, special, config)
        noisy = torch.cat([states.noisy_ids_BT.flatten() for states in calibration.micro_batches])
        assert (noisy == special.mask_token_id).any()
        seen: dict[str, float] = {}
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, given, name=name: seen.update({name: max(seen.get(name, 0.0), float(given[0].abs().max()))})
            )
            for name, layer in linear_layers(model)
        ]
        calibration.run(model)
        for hook in hooks:
            hook.remove()
        quantize(model, "fp8", lambda: calibration.run(model))
        assert {name: float(layer.input_quantizer.amax) for name, layer in linear_layers(model)} == seen


@pytest.mark.parametrize("quantization", LARGEST)
@pytest.mark.parametrize("kind", ["folder", "mixture"])
def test_the_folder_stands_for_what_the_model_multiplies_with(request, world_of_one, tmp_path, quantization, kind):
    source = request.getfixturevalue(kind)
    architecture, output = architecture_of(source), tmp_path / "out"
    with layout(ParallelConfig()) as groups:
        model, _, _ = quantized_student(source, groups, quantization)
        assert all(is_quantized(layer) for _, layer in linear_layers(model))
        write_quantized_folder(
            output,
            model,
            architecture,
            quantization,
            dtype="float32",
            write_assets=lambda into: copy_assets(source, into),
            report={},
        )
        multiplied = dict(multiplied_tensors(model, architecture))
    read = dict(dequantized_tensors(output))
    assert read.keys() == multiplied.keys()
    plain = SafetensorsReader(source)
    quantized = {name for name in SafetensorsReader(output).names if f"{name}_scale" in SafetensorsReader(output).names}
    assert quantized == {name for name in plain.names if name.endswith("_proj.weight")}
    for name, weight in multiplied.items():
        assert torch.allclose(read[name], weight, rtol=3e-7, atol=0), name
        if name in quantized:
            largest = plain.read(name).abs().amax(dim=1, keepdim=True)
            step = (largest if quantization == "int8" else largest.max()) / (127 if quantization == "int8" else 16)
            difference = (read[name] - plain.read(name)).abs()
            assert (difference <= step).all() and difference.max() > 0
        elif name in plain.names and read[name].shape == plain.shape(name):
            assert torch.equal(read[name], plain.read(name))


def test_what_servers_read_is_in_the_folder(folder, world_of_one, tmp_path):
    """vLLM's modelopt.py and compressed_tensors_w8a8_int8.py; SGLang's modelopt_quant.py."""
    architecture, found = architecture_of(folder), {}
    for quantization in LARGEST:
        with layout(ParallelConfig()) as groups:
            model, _, _ = quantized_student(folder, groups, quantization)
            write_quantized_folder(
                tmp_path / quantization,
                model,
                architecture,
                quantization,
                dtype="float32",
                write_assets=lambda into: copy_assets(folder, into),
                report={"format": quantization},
            )
        files = [tmp_path / quantization / name for name in ("config.json", "hf_quant_config.json")]
        found[quantization] = [json.loads(file.read_text()) for file in files]
    config, modelopts = found["fp8"]
    assert config["dtype"] == "float32"
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert config["quantization_config"]["quant_algo"] == modelopts["quantization"]["quant_algo"] == "FP8"
    assert config["quantization_config"]["ignore"] == modelopts["quantization"]["exclude_modules"] == ["lm_head"]
    config, modelopts = found["int8"]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    assert modelopts["quantization"]["quant_algo"] == "W8A8_SQ_PER_CHANNEL"
    fp8, int8 = (SafetensorsReader(tmp_path / name) for name in ("fp8", "int8"))
    query, key = (f"model.layers.1.self_attn.{part}_proj" for part in "qk")
    assert fp8.read(f"{query}.weight").dtype is torch.float8_e4m3fn
    assert int8.read(f"{query}.weight").dtype is torch.int8
    assert int8.shape(f"{query}.weight_scale") == (48, 1)
    for scale in ("weight_scale", "input_scale"):  # servers make one matrix of the three again
        assert fp8.shape(f"{query}.{scale}") == (1,)
        assert torch.equal(fp8.read(f"{query}.{scale}"), fp8.read(f"{key}.{scale}"))
    assert json.loads((tmp_path / "int8" / "quantization_report.json").read_text()) == {"format": "int8"}


def test_the_teacher_is_quantized_by_its_own_responses(folder, world_of_one):
    from megatron_opdlm.data.special_tokens import SpecialTokens
    from megatron_opdlm.evaluation.evaluated_model import autoregressive

    with layout(ParallelConfig()) as groups:
        config = config_of(folder, autoregressive(ROLLOUT))
        model = load_teacher(config, groups)
        special = SpecialTokens(52, 52, (5,), 0)
        calibration = calibrate(model, special, config, is_student=False)
        before = calibration.probe(model)
        assert calibration.divergence_from(before.clone(), model) == 0.0
        quantize(model, "int8", lambda: calibration.run(model))
        divergence = calibration.divergence_from(before.clone(), model)
        now = calibration.probe(model)
        textbook = (before.exp() * (before - now)).sum(-1).mean()
    assert 0 < divergence < 0.1
    assert abs(divergence - float(textbook)) <= 1e-6


def test_a_quantized_weight_without_its_scale_is_noticed(folder, world_of_one, tmp_path, monkeypatch):
    from megatron_opdlm.export import quantize_folder

    monkeypatch.setitem(quantize_folder.FIELDS, "weight_scale", quantize_folder._input_scale)
    with layout(ParallelConfig()) as groups:
        model, _, _ = quantized_student(folder, groups, "fp8")
        with pytest.raises(AssertionError, match="reads back differently"):
            write_quantized_folder(
                tmp_path / "out",
                model,
                architecture_of(folder),
                "fp8",
                dtype="float32",
                write_assets=lambda into: copy_assets(folder, into),
                report={},
            )
    assert not list(tmp_path.glob("out*"))


def test_layers_that_modelopt_does_not_know_are_noticed(mixture, world_of_one, monkeypatch):
    """Those of attention go past Megatron's forward unless they are told not to; those of experts are Megatron's."""
    from megatron_opdlm.export import quantize as module

    monkeypatch.setattr(module, "without_direct_products", lambda modules: None)
    message = r"left decoder.layers.0.self_attention.linear_\w+ as it was"
    with layout(ParallelConfig()) as groups, pytest.raises(AssertionError, match=message):
        quantized_student(mixture, groups, "fp8")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"parallel": ParallelConfig(tensor_model_parallel_size=2)},
            "parallel.tensor_model_parallel_size (2) must be 1",
        ),
        ({"transformer": {"transformer_impl": "transformer_engine"}}, "transformer_impl (transformer_engine) must be"),
    ],
)
def test_what_cannot_be_quantized_is_refused(folder, sections, message):
    with pytest.raises(ValueError) as refused:
        check_quantization("fp8", tiny_config(folder, lora=LoraConfig(), **sections))
    assert message in str(refused.value)


def test_four_bits_are_refused_without_a_gpu(folder):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"--format \(nvfp4\) needs a GPU"):
            check_quantization("nvfp4", tiny_config(folder))


def test_the_order_of_tensors_is_the_models(folder, world_of_one):
    with layout(ParallelConfig()) as groups:
        model, _, _ = quantized_student(folder, groups, "fp8")
        names = [name for name, _ in quantized_tensors(model, architecture_of(folder), "fp8")]
    at = names.index("model.layers.0.self_attn.o_proj.weight")
    assert names[at + 1 : at + 3] == [
        f"model.layers.0.self_attn.o_proj.{scale}" for scale in ("weight_scale", "input_scale")
    ]
