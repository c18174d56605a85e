"""FP8 for the linear layers, by Transformer Engine: what asks for it, what it needs, when it stays off.

Megatron wraps the layers of a model whose configuration says `fp8` in Transformer Engine's FP8 region. Student and
teacher have a configuration each, so each has its own recipe:

    check_fp8("precision.fp8", "tensorwise", architecture, parallel, transformer_impl="transformer_engine")
    TransformerConfig(**settings, **fp8_settings("tensorwise"))
    with without_fp8(student):                        # rollout
        hidden = student(ids, positions, None)

Rollout decodes without FP8: it is bound by the bandwidth of memory, its token lists have any length while FP8 products
take multiples of 16, and delayed scales are not calibrated before the first training step.

Not yet run on a GPU; written against Transformer Engine 2.9 to 2.20 and Megatron-Core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.fp8_utils import get_fp8_recipe

from megatron_opdlm.config.schema import ParallelConfig
from megatron_opdlm.models.layer_specs import has_transformer_engine
from megatron_opdlm.models.qwen3 import Qwen3Architecture

LOWEST_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
LOWEST_CUDA = {"delayed": (12, 1), "tensorwise": (12, 1), "blockwise": (12, 9)}
"""Compute capability and CUDA version by recipe: `check_fp8_support` and `check_fp8_block_scaling_support` in
transformer_engine/pytorch/quantization.py."""

_MODULE_STATE = re.compile(r"_extra_state\d*$")  # numbered where a module holds several experts

DIRECTIONS = ("scaling_fwd", "scaling_bwd")
FIELDS = ("scale", "amax_history")
"""Where a module of Transformer Engine keeps its scales: `module.fp8_meta[direction].field`."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What of a machine decides whether it has FP8."""

    compute_capability: tuple[int, int] | None
    """Of the GPU, e.g. (9, 0) for an H100; None where there is none."""
    cuda: tuple[int, int] | None
    """CUDA version that PyTorch was built with."""
    has_transformer_engine: bool


def this_machine() -> Machine:
    """The machine of this process."""
    has_gpu = torch.cuda.is_available()
    return Machine(
        compute_capability=torch.cuda.get_device_capability() if has_gpu else None,
        cuda=tuple(int(part) for part in torch.version.cuda.split(".")[:2]) if torch.version.cuda else None,
        has_transformer_engine=has_transformer_engine(),
    )


def check_fp8(
    setting: str,
    recipe: str,
    architecture: Qwen3Architecture,
    parallel: ParallelConfig,
    *,
    transformer_impl: str,
    machine: Machine | None = None,
) -> None:
    """Checks that the model can have the FP8 that `setting` (`precision.fp8` or `precision.teacher_fp8`) asks for.

    ValueError names the setting, its value and what is missing. Touches no weights and writes nothing.
    """
    if recipe == "off":
        return
    machine = machine or this_machine()
    reason = (
        _machine_refusal(recipe, machine)
        or _layers_refusal(transformer_impl, machine)
        or _shape_refusal(recipe, architecture, parallel)
    )
    if reason:
        raise ValueError(f"{setting} ({recipe}) {reason}")


def _machine_refusal(recipe: str, machine: Machine) -> str | None:
    if machine.compute_capability is None:
        return "needs a GPU, and this machine has none"
    if machine.compute_capability < LOWEST_CAPABILITY[recipe]:
        needed, found = (_version(pair) for pair in (LOWEST_CAPABILITY[recipe], machine.compute_capability))
        return f"needs a GPU of compute capability {needed} or higher, not {found}"
    if machine.cuda is None or machine.cuda < LOWEST_CUDA[recipe]:
        found = _version(machine.cuda) if machine.cuda else "none"
        return f"needs a PyTorch built with CUDA {_version(LOWEST_CUDA[recipe])} or newer, not {found}"
    return None


def _layers_refusal(transformer_impl: str, machine: Machine) -> str | None:
    if not machine.has_transformer_engine:
        return 'needs Transformer Engine, which cannot be imported; try pip install "megatron-opdlm[te]"'
    if transformer_impl != "transformer_engine":
        return f"needs transformer.transformer_impl ({transformer_impl}) to be transformer_engine"
    return None


def _shape_refusal(recipe: str, architecture: Qwen3Architecture, parallel: ParallelConfig) -> str | None:
    """Sides of the weight matrices on one rank. Under sequence parallelism blockwise parts travel in whole blocks."""
    if recipe == "delayed" and architecture.mixture is not None:
        return "needs a dense model: the scales of a layer with several experts could not be saved"
    size, dim = parallel.tensor_model_parallel_size, architecture.head_dim
    heads, groups = architecture.num_attention_heads, architecture.num_key_value_heads
    sides = {
        "hidden_size": (architecture.hidden_size, 128 if recipe == "blockwise" and parallel.sequence_parallel else 16),
        "num_attention_heads x head_dim": (heads * dim // size, 16),
        "(num_attention_heads + 2 num_key_value_heads) x head_dim": ((heads + 2 * groups) * dim // size, 16),
    }
    if architecture.mixture is None:
        sides["intermediate_size"] = architecture.intermediate_size // size, 16
    else:
        expert_size = parallel.expert_tensor_parallel_size or size
        sides["moe_intermediate_size"] = architecture.mixture.moe_intermediate_size // expert_size, 16
    for name, (side, multiple) in sides.items():
        if side % multiple:
            return f"needs {name}, {side} on each of {size} tensor-parallel ranks, to be a multiple of {multiple}"
    return None


def _version(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"


def fp8_settings(recipe: str, attention: bool = False) -> dict:
    """The fields of Megatron's TransformerConfig for a recipe; `attention` puts the attention products in FP8 too."""
    if recipe == "off":
        return {}
    return {
        # Activations and weights in E4M3; gradients need E5M2's range unless each block of 128 has its own scale.
        "fp8": "e4m3" if recipe == "blockwise" else "hybrid",
        "fp8_recipe": recipe,
        "fp8_dot_product_attention": attention,
        # Delayed scaling. Rows differ in length and difficulty, so the maximum of one micro-batch says little about the
        # next; Megatron's default looks at one alone, Transformer Engine's own at these 1024.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    }


@contextmanager
def without_fp8(model: torch.nn.Module) -> Iterator[None]:
    """While it lasts, Megatron runs the model's layers in their own number format.

    Megatron's transformer block reads `config.fp8` at each forward. Transformer Engine keeps what it has learnt of the
    scales, and quantizes the weights anew at the first micro-batch of the next training forward.
    """
    config, fp8 = model.config, model.config.fp8
    config.fp8 = None
    try:
        yield
    finally:
        config.fp8 = fp8


def is_module_state(key: str) -> bool:
    """Whether a key of a state dict is the extra state that Transformer Engine's modules add.

    Checkpoints leave it out: it holds pickled objects, which Transformer Engine 2.18 refuses to load, and a checkpoint
    with it would fit only the kind of layers that wrote it. `scaling_state` has what matters of it.
    """
    return _MODULE_STATE.search(key) is not None


def scaling_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What delayed scaling of the linear layers remembers, for a resumed run; {} for anything else.

    Keys are `<layer>.scaling_fwd.scale [T]`, `<layer>.scaling_fwd.amax_history [length, T]` for the T tensors of a
    linear layer, and the same of `scaling_bwd`; on the CPU. All ranks of a data- and tensor-parallel group hold the
    same, because Megatron reduces the maxima over them. FP8 attention starts with scales of one again.
    """
    return {
        f"{name}.{direction}.{field}": getattr(layer.fp8_meta[direction], field).detach().cpu().clone()
        for name, layer in _delayed_layers(model)
        for direction in DIRECTIONS
        if direction in layer.fp8_meta
        for field in FIELDS
    }


def load_scaling_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Gives a model that has not run yet the scales of `scaling_state`; one without delayed scaling ignores them."""
    for name, layer in _delayed_layers(model):
        if f"{name}.{DIRECTIONS[0]}.scale" not in state:
            continue
        saved = {direction: [state[f"{name}.{direction}.{field}"] for field in FIELDS] for direction in DIRECTIONS}
        recipe = get_fp8_recipe(model.config)
        # What a layer does at its first FP8 forward. A product has three tensors: input, weight and output.
        layer.fp8_meta |= {"recipe": recipe, "num_gemms": len(saved[DIRECTIONS[0]][0]) // 3}
        layer.init_fp8_meta_tensors(recipe)
        layer.reset_fp8_meta_tensors(saved)


def _delayed_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Transformer Engine's modules with weights, in a model with delayed scaling."""
    if model.config.fp8 and model.config.fp8_recipe == "delayed":
        for name, module in model.named_modules():
            if hasattr(module, "fp8_meta") and list(module.parameters(recurse=False)):
                yield name, module
