"""Low-rank adapters on the student's linear layers (LoRA, https://arxiv.org/abs/2106.09685); the rest is frozen.

A layer `W x` becomes `W x + (alpha / rank) B A x`, with `A [rank, inputs]` drawn at random and `B [outputs, rank]` zero
at the start. Rollout and training run the same modules, so the rollout has the adapters too. There is no dropout: the
rollout would not have it, and training logits would no longer be those that the rollout saw.

    check_lora(config.lora, architecture, transformer_impl="local")
    add_adapters(model, config.lora, seed=config.training.seed)       # after the weights are loaded

Under tensor parallelism an adapter is cut as its layer is: where that is cut by outputs (`linear_qkv`, `linear_fc1`), B
is cut and A whole; where by inputs (`linear_proj`, `linear_fc2`), A is cut and B whole. Only the `rank` numbers between
A and B travel. Under sequence parallelism the whole one of the two sees a part of the positions, and Megatron adds its
gradient up over the ranks, as it does for norms.

Why our own: peft's `LoraParallelLinear` (peft/tuners/lora/tp_layer.py) wraps Megatron's linear layers too, but has no
sharded state for distributed checkpoints. Those of Megatron-Bridge and NeMo do, and come with a model zoo and a trainer
around Megatron that would stand beside ours. What is needed here is one module.

Legend: `S` positions, `B` rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_opdlm.config.schema import LoraConfig
from megatron_opdlm.diffusion.randomness import sequence_generator
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.models.qwen3 import Qwen3Architecture

PARENTS = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}
"""`lora.target_modules` -> the module of a layer that holds it."""
NAMES = ("lora_a", "lora_b")
"""Of an adapter's parameters."""


class AdaptedLinear(torch.nn.Module):
    """A frozen linear layer of Megatron's with an adapter beside it; it takes and gives what the layer does.

    Its sharded state is the adapter's alone, in whole tensors `[rank, inputs]` and `[outputs, rank]` whatever the
    tensor-parallel size, the outputs in the order of the layer's weight.
    """

    def __init__(
        self, linear: torch.nn.Module, *, rank: int, alpha: float, is_gated: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base, self.scale, self.is_gated = linear, alpha / rank, is_gated
        self.cuts_outputs = isinstance(linear, ColumnParallelLinear)
        self.group, self.sequence_parallel = linear.tp_group, linear.sequence_parallel
        # Drawn whole on every rank, so that a run does not depend on its layout.
        whole_a = (2 * torch.rand(rank, linear.input_size, generator=generator) - 1) / linear.input_size**0.5
        if not self.cuts_outputs:
            whole_a = whole_a.chunk(self.group.size(), dim=1)[self.group.rank()]
        outputs = len(linear.weight)  # this rank's
        self.lora_a = torch.nn.Parameter(whole_a.to(linear.weight).contiguous())
        self.lora_b = torch.nn.Parameter(linear.weight.new_zeros(outputs, rank))
        cut, whole = (self.lora_b, self.lora_a) if self.cuts_outputs else (self.lora_a, self.lora_b)
        set_tensor_model_parallel_attributes(cut, True, 0 if self.cuts_outputs else 1, 1)
        whole.sequence_parallel = self.sequence_parallel

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output and bias, as Megatron's layers give them. All tensor-parallel ranks must call it."""
        output, bias = self.base(input_, *args, **kwargs)
        return output + self.scale * F.linear(self._across_ranks(F.linear(input_, self.lora_a)), self.lora_b), bias

    def _across_ranks(self, low_SBr: torch.Tensor) -> torch.Tensor:
        """What goes from A to B: every position where outputs are cut, the sum over the inputs where these are."""
        if self.cuts_outputs:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(low_SBr, group=self.group)
            return copy_to_tensor_model_parallel_region(low_SBr, group=self.group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low_SBr, group=self.group)
        return reduce_from_tensor_model_parallel_region(low_SBr, group=self.group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The adapter as Megatron's sharded tensors. All ranks must call it."""
        sharded = make_sharded_tensors_for_checkpoint(
            {name: getattr(self, name) for name in NAMES},
            prefix,
            {"lora_b": 0} if self.cuts_outputs else {"lora_a": 1},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.is_gated:  # a rank has its rows of the gate, then those of the other half
            key = f"{prefix}lora_b"
            sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets)
        return sharded


def check_lora(lora: LoraConfig, architecture: Qwen3Architecture, *, transformer_impl: str) -> None:
    """ValueError if the model cannot have these adapters."""
    if lora.rank == 0:
        return
    if transformer_impl != "local":
        raise ValueError(
            f"lora.rank ({lora.rank}) needs student.transformer.transformer_impl ({transformer_impl}) to be local: "
            "Transformer Engine's layers keep to themselves the normalised input that an adapter reads"
        )
    of_mlp = [name for name in lora.target_modules if PARENTS[name] == "mlp"]
    if architecture.mixture is not None and of_mlp:
        raise ValueError(
            f"lora.target_modules ({', '.join(lora.target_modules)}) must not have {of_mlp[0]} in a mixture of "
            "experts: each expert would have an adapter of its own, trained on the few tokens that go there; take "
            "linear_qkv and linear_proj"
        )


def add_adapters(model: PipelineModel, lora: LoraConfig, seed: int) -> None:
    """Freezes the model, in place, and puts adapters beside its linear layers. It has its weights already.

    The same adapters on every layout: each is drawn from a generator of its own. All ranks must call it.
    """
    for chunk in model.chunks:
        chunk.requires_grad_(False)
        for layer in chunk.decoder.layers:
            for name in lora.target_modules:
                parent = getattr(layer, PARENTS[name])
                adapted = AdaptedLinear(
                    getattr(parent, name),
                    rank=lora.rank,
                    alpha=lora.alpha,
                    is_gated=name == "linear_fc1",
                    generator=sequence_generator(seed, 0, layer.layer_number, 0, purpose=f"adapter {name}"),
                )
                setattr(parent, name, adapted)
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_let_gradients_begin)


def _let_gradients_begin(_: torch.nn.Module, __: tuple, embedded: torch.Tensor) -> None:
    """Activation recompute gives no gradients to the adapters of a layer none of whose inputs asks for one."""
    if torch.is_grad_enabled():
        embedded.requires_grad_()


def has_adapters(module: torch.nn.Module) -> bool:
    """Whether a model, or a part of it, has adapters."""
    return any(isinstance(part, AdaptedLinear) for part in module.modules())


def is_adapter(key: str) -> bool:
    """Whether a key of a state dict is a parameter of an adapter."""
    return key.rpartition(".")[2] in NAMES
