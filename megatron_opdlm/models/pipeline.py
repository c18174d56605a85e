"""One rank's part of a model that is cut into pipeline stages along its layers.

A stage holds one chunk of neighbouring layers or, under Megatron's interleaved schedule, several: with two stages of
two chunks and eight layers, stage 0 has layers 0-1 and 4-5, stage 1 has 2-3 and 6-7. The first chunk of all has the
embedding, the last one the final norm and the output layer. Without pipeline parallelism there is one chunk with all.

    model = build_model(architecture, core_attention, ...)
    hidden = model(ids, position_ids, None)                    # [S, B, H] on the last stage, None on the others
    schedule(model=model.chunks, ...)                          # Megatron's, for training

Parameters and modules go by the names that they have in the whole model, whichever stage holds them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig

from megatron_opdlm.parallel.context_link import ContextLink
from megatron_opdlm.parallel.host_memory import HostedWeights
from megatron_opdlm.parallel.stage_link import StageLink

if TYPE_CHECKING:
    from megatron_opdlm.models.build import Qwen3Model

_LAYER = re.compile(r"^decoder\.layers\.(\d+)")


class PipelineModel:
    """The chunks of a model on this rank, in the order of their layers, and the link to the other stages.

    `context` links the ranks that share sequences while they train. `tensor_group` has those that share the
    weight matrices, `replica_group` all that hold one model together, its stages too. `expert_group` has the ranks that
    each forward needs because they share the experts of a mixture; None if there are none. They may decode and train
    different rows.
    """

    def __init__(
        self,
        chunks: list[Qwen3Model],
        link: StageLink,
        context: ContextLink,
        tensor_group: dist.ProcessGroup,
        replica_group: dist.ProcessGroup,
        expert_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.chunks, self.link, self.context = chunks, link, context
        self.tensor_group, self.replica_group, self.expert_group = tensor_group, replica_group, expert_group
        self._hosted: HostedWeights | None = None
        self.num_forwards = 0
        """Forwards in rollout and training that have begun: a sign of life, not an account."""

    @property
    def config(self) -> TransformerConfig:
        """Megatron's configuration, one for all chunks."""
        return self.chunks[0].config

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the hidden states behind the last layer, and the output layer."""
        return self.link.is_last_stage

    def __call__(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """A forward through all stages: hidden states `[S, B, H]` on the last one, None on the others.

        Arguments as for `Qwen3Model`. All ranks of the tensor- and pipeline-parallel groups must call it with the same.
        Gradients flow back within a stage only; between stages they are the business of Megatron's schedules.
        """
        with self.on_device():
            for chunk in self.chunks:
                hidden_SBH = self.run(chunk, input_ids, position_ids, attention_mask)
        return hidden_SBH if self.is_last_stage else None

    def run(
        self,
        chunk: Qwen3Model,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """One chunk's part of a forward: from the chunk before (of another stage), through it, to the one behind."""
        if not chunk.pre_process:
            num_rows, num_positions = input_ids.shape
            shards = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
            shape = (num_positions // shards, num_rows, self.config.hidden_size)
            chunk.set_input_tensor(self.link.receive(shape, self.config.pipeline_dtype))
        hidden_SBH = chunk(input_ids, position_ids, attention_mask)
        if not chunk.post_process:
            self.link.send(hidden_SBH.detach().contiguous())
        return hidden_SBH

    @property
    def output_weight(self) -> torch.Tensor:
        """`Qwen3Model.output_weight` of the last stage."""
        return self._last_chunk.output_weight

    def whole_sequence(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """`Qwen3Model.whole_sequence`."""
        return self.chunks[-1].whole_sequence(hidden_SBH)

    def vocab_parallel_logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """`Qwen3Model.vocab_parallel_logits` of the last stage."""
        return self._last_chunk.vocab_parallel_logits(hidden_NH)

    @property
    def _last_chunk(self) -> Qwen3Model:
        assert self.is_last_stage, "only the last pipeline stage has the output layer"
        return self.chunks[-1]

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules of this rank."""
        for chunk in self.chunks:
            yield from chunk.modules()

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """All modules of this rank with their names in the whole model."""
        for chunk in self.chunks:
            yield from ((_whole_name(chunk, name), module) for name, module in chunk.named_modules())

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All parameters of this rank."""
        for chunk in self.chunks:
            yield from chunk.parameters()

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """All parameters of this rank with their names in the whole model."""
        for chunk in self.chunks:
            yield from ((_whole_name(chunk, name), parameter) for name, parameter in chunk.named_parameters())

    def freeze(self) -> PipelineModel:
        """Takes the model out of training: no gradients. Returns the model."""
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)
        return self

    def move_to_host(self) -> PipelineModel:
        """Leaves a frozen model's weights in host memory, all but the output layer's, whose logits come later.

        Returns the model. A call of it and `on_device` bring them to the device for as long as they last.
        """
        output_weight = self.output_weight if self.is_last_stage else None
        self._hosted = HostedWeights(weight for weight in self.parameters() if weight is not output_weight)
        return self

    def on_device(self) -> AbstractContextManager[None]:
        """A context within which the chunks can run; of no effect unless `move_to_host` was called."""
        return contextlib.nullcontext() if self._hosted is None else self._hosted.on_device()

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """The weights as Megatron's sharded tensors, by their names in the whole model. All ranks must call it."""
        return {
            _whole_name(chunk, name): value
            for chunk in self.chunks
            for name, value in chunk.sharded_state_dict(metadata=metadata).items()
        }

    def state_dict(self) -> dict[str, Any]:
        """This rank's weights by their names in the whole model."""
        return {_whole_name(chunk, name): value for chunk in self.chunks for name, value in chunk.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fills every chunk from `state`, by the names in the whole model. RuntimeError if one is missing."""
        unknown = set(state)
        for chunk in self.chunks:
            names = {_whole_name(chunk, name): name for name in chunk.state_dict()}
            chunk.load_state_dict({names[name]: value for name, value in state.items() if name in names})
            unknown -= names.keys()
        assert not unknown, f"no chunk of this rank has {sorted(unknown)}"


def _whole_name(chunk: Qwen3Model, name: str) -> str:
    """Megatron counts the layers of a chunk from 0; `layer_number` counts those of the whole model from 1."""
    return _LAYER.sub(lambda match: f"decoder.layers.{chunk.decoder.layers[int(match[1])].layer_number - 1}", name)
