"""Seconds of one forward of the rollout, in which a number of sequences each take a denoising step.

    step = DecodeStep(models, config, layout, gpu, workload, Rates())
    step.seconds(16), step.by_resource(16)

Few tokens share a forward, so it mostly reads: all weights of the rank, and the cache of every sequence. Under pipeline
parallelism as many groups of sequences take turns as there are stages; a group's step then takes as long as all stages
one after the other, with that group's part of the sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_opdlm.config.limits import drawn_together
from megatron_opdlm.config.schema import Config
from megatron_opdlm.observability import throughput
from megatron_opdlm.observability.hardware import Gpu
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.memory import Models
from megatron_opdlm.planning.rates import Rates, message_seconds
from megatron_opdlm.planning.work import layer_messages, model_shape
from megatron_opdlm.planning.workload import Workload


@dataclass(frozen=True)
class DecodeStep:
    """What decides it."""

    models: Models
    config: Config
    layout: Layout
    gpu: Gpu
    workload: Workload
    rates: Rates

    def seconds(self, num_sequences: int) -> float:
        """Of a forward of a rank that has so many sequences."""
        parts = self.by_resource(num_sequences)
        on_gpu = max(parts["compute"], parts["memory bandwidth"]) + parts["network"]
        return max(on_gpu, parts["launches"]) + parts["host"]

    def by_resource(self, num_sequences: int) -> dict[str, float]:
        """Before they overlap."""
        gpu, rates, layout = self.gpu, self.rates, self.layout
        group = max(1, math.ceil(num_sequences / layout.pipeline))
        tokens = group * self._tokens_per_sequence
        messages = layer_messages(self.models.student, layout, tokens, self._itemsize)
        in_model = [message for message in messages if message.name != "context"]
        layers = self.models.student.num_hidden_layers
        return {
            "compute": self._flops(group, tokens) / layout.tensor / (gpu.flops * rates.matmul),
            "memory bandwidth": self._bytes(group, tokens) / (gpu.memory_bandwidth * rates.memory),
            "network": layers * sum(message_seconds(m, layout, gpu, rates) for m in in_model)
            + (layout.pipeline - 1) * 2 * rates.message_latency,
            "launches": layers * self._launch_seconds,
            "host": rates.host_seconds_per_forward,
        }

    @property
    def _tokens_per_sequence(self) -> float:
        """Its block; and once per block the one before, clean, for the cache."""
        return self.workload.block_size * (1 + 1 / self.workload.steps_per_block)

    @property
    def _itemsize(self) -> int:
        return 4 if self.config.precision.dtype == "float32" else 2

    @property
    def _launch_seconds(self) -> float:
        is_mixture = self.models.student.mixture is not None
        is_replayed = self.config.rollout.cuda_graphs and not is_mixture and self.layout.pipeline == 1
        return self.rates.replayed_layer if is_replayed else self.rates.launch_seconds(is_mixture)

    @property
    def _context(self) -> float:
        """Tokens that a sequence has in the cache, in the mean."""
        return self.workload.prompt_tokens + self.workload.response_tokens / 2

    def _predictions(self, group: int) -> float:
        """Masked positions whose logits a forward makes."""
        return group * self.workload.block_size * self.workload.trained_share

    def _flops(self, group: int, tokens: float) -> float:
        shape = model_shape(self.models.student)
        layers = throughput.linear_flops(shape, 1) * tokens + throughput.attention_flops(shape, 1) * (
            tokens * self._context
        )
        return layers + throughput.head_flops(shape, 1) * self._predictions(group)

    def _bytes(self, group: int, tokens: float) -> float:
        """Read by one rank: weights that a token meets, the output layer for each part of the drawn, the cache."""
        student, size = self.models.student, self.layout.tensor
        shape = model_shape(student)
        vocabulary = shape.vocab_size * shape.hidden_size / size
        attention_and_router = throughput.matrix_weights_per_layer(shape) - 3 * (
            shape.num_experts_per_token * shape.hidden_size * shape.ffn_hidden_size
        )
        weights = shape.num_layers * (attention_and_router / size + self._mlp_weights(tokens))
        together = drawn_together(self.models.padded_vocab_size(self.config) // size)
        weights += vocabulary * math.ceil(self._predictions(group) / together)
        cached = 2 * shape.num_layers * shape.num_query_groups * shape.head_dim / size * group * self._context
        return self._itemsize * (weights + cached)

    def _mlp_weights(self, tokens: float) -> float:
        """Elements of a layer's MLP, or of those of the rank's experts that some token goes to."""
        student, layout = self.models.student, self.layout
        matrices = 3 * student.hidden_size
        if student.mixture is None:
            return matrices * student.intermediate_size / layout.tensor
        mixture = student.mixture
        of_all_ranks = tokens * max(1, layout.expert * layout.expert_tensor / layout.tensor)
        met = 1 - (1 - mixture.num_experts_per_tok / mixture.num_experts) ** of_all_ranks
        experts = mixture.num_experts / layout.expert
        return experts * met * matrices * mixture.moe_intermediate_size / layout.expert_tensor
