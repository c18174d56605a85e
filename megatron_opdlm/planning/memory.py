"""Memory of one rank, part by part, and the most of it that is in use at one time.

    plan = plan_memory(models, config, layout, workload, stage=0)
    plan.parts["optimizer"], plan.peak, plan.peak_phase

What lasts for the run: weights, gradients, optimizer, teacher. On top come, one after the other and never together:
the rollout's key-value cache; the teacher's forward and the hidden states that it leaves; the student's activations,
then either the chunks of logits with the output layer's gradient or the backward pass of a layer. Rows are planned at
their longest, which a run will meet. Bytes throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opdlm.config.architecture import Qwen3Architecture
from megatron_opdlm.config.limits import drawn_together
from megatron_opdlm.config.schema import Config
from megatron_opdlm.planning.activations import TokenShape, in_flight
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.parameters import count, gradient_buffers, largest, rank_parameters
from megatron_opdlm.planning.workload import Workload, rows_per_response

GIB = 2**30
PAGE = 256
"""Tokens of a page of the cache."""
CACHE_SHARE = 0.8
"""Of the free memory that the cache may take (`rollout.cache_size`)."""
CHUNK_BUFFERS = {"forward_kl": 3, "reverse_kl": 3, "mixture": 4, "jsd": 4}
"""`divergence.kind` -> float32 buffers of a chunk's logits that are alive at one time; 5 under `teacher_top_p`."""


@dataclass(frozen=True)
class Models:
    """The two shapes of a run, and the rows of their embeddings."""

    student: Qwen3Architecture
    teacher: Qwen3Architecture | None
    """None where the objective has none."""
    layers: str = "transformer_engine"
    """`transformer_impl` of the student: what its activations are made of."""

    def padded_vocab_size(self, config: Config) -> int:
        """Over all ranks. The mask token is taken to have a row, as in every Qwen3, whose tokenizer leaves some."""
        parallel = config.parallel
        multiple = parallel.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size
        return max(model.padded_vocab_size(*multiple) for model in (self.student, self.teacher) if model is not None)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Of one rank of a pipeline stage, in bytes."""

    parts: dict[str, float]
    """Name -> bytes; what lasts first."""
    phases: dict[str, float]
    """`rollout` (with a cache of one longest sequence), `teacher`, `student` -> bytes in use at most."""
    cache_bytes_per_token: float
    cache_wanted: float
    """Bytes for all sequences that a rank decodes at one time, each at its longest."""

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phases.get)

    @property
    def largest_part(self) -> str:
        return max(self.parts, key=self.parts.get)

    def cache_bytes(self, budget: float) -> float:
        """What the cache takes of `budget` bytes: all it wants, within its share of what is free."""
        free = budget - (self.phases["rollout"] - self.parts["least cache"])
        return max(min(self.cache_wanted, CACHE_SHARE * free), self.parts["least cache"])


def plan_memory(models: Models, config: Config, layout: Layout, workload: Workload, stage: int) -> MemoryPlan:
    """The plan of a rank of this stage, all of whose tensor- and data-parallel ranks need as much."""
    lasting = lasting_parts(models, config, layout, stage)
    passing = _student_parts(models, config, layout, workload, stage)
    passing |= _teacher_parts(models, config, layout, workload, stage)
    cached = _cache_bytes_per_token(models.student, layout, _itemsize(config))
    longest = -(-workload.longest_row // PAGE) * PAGE
    num_sequences = min(config.rollout.batch_size, -(-workload.num_responses // layout.rollout_size))
    passing["least cache"] = cached * (longest + PAGE)
    passing["decoding"] = _decoding_bytes(models, config, layout)
    offloaded = passing.pop("offloaded teacher")
    base = sum(lasting.values())
    work = max(passing["logits"] + passing["output gradient"], passing["backward"])
    phases = {
        "rollout": base + passing["least cache"] + passing["decoding"],
        "teacher": base + offloaded + passing["targets"] + passing["teacher forward"],
        "student": base + passing["targets"] + passing["activations"] + work,
    }
    return MemoryPlan(
        parts=lasting | passing,
        phases=phases,
        cache_bytes_per_token=cached,
        cache_wanted=cached * longest * num_sequences,
    )


def lasting_parts(models: Models, config: Config, layout: Layout, stage: int) -> dict[str, float]:
    """What a rank holds for as long as the run lasts."""
    itemsize, padded = _itemsize(config), models.padded_vocab_size(config)
    buffers = gradient_buffers(models.student, layout, padded, stage, config.parallel.overlap_grad_reduce)
    num_elements = sum(buffer.num_elements for buffer in buffers)
    num_updated = sum(buffer.num_shared_out for buffer in buffers)
    # two moments; and main parameters, unless the weights are float32 themselves
    state = 8 if itemsize == 4 else 12
    parts = {
        "weights": itemsize * num_elements,
        "gradients": 4 * num_elements,
        "optimizer": state * num_updated * (1 - config.optimizer.cpu_offload_fraction),
    }
    if models.teacher is not None:
        parts["teacher"] = itemsize * _teacher_elements(models, config, layout, stage, is_resident=True)
    if copies := _fp8_copies(models, config, layout, stage):
        parts["fp8 copies"] = copies
    return parts


def _teacher_elements(models: Models, config: Config, layout: Layout, stage: int, is_resident: bool) -> int:
    """Elements that stay on the device, or those that come for its forward: of an offloaded teacher the output layer
    stays, which is the embedding where they are one on the same stage."""
    whole = count(models.teacher, layout, models.padded_vocab_size(config), stage)
    if not config.teacher.offload:
        return whole if is_resident else 0
    is_last = stage == layout.pipeline - 1
    output = models.padded_vocab_size(config) // layout.tensor * models.teacher.hidden_size if is_last else 0
    return output if is_resident else whole - output


def _fp8_copies(models: Models, config: Config, layout: Layout, stage: int) -> float:
    """Transformer Engine keeps a linear layer's weight in FP8: as it is and transposed for the student's backward."""
    copies, padded = 0.0, models.padded_vocab_size(config)
    teacher_stays = models.teacher is not None and not config.teacher.offload
    of_models = ((models.student, config.precision.fp8, 2), (models.teacher, config.precision.teacher_fp8, 1))
    for model, recipe, num_copies in of_models:
        if recipe != "off" and (model is models.student or teacher_stays):
            chunks = rank_parameters(model, layout, padded, stage)
            copies += num_copies * sum(p.num_elements for chunk in chunks for p in chunk if ".linear_" in p.name)
    return copies


def _student_parts(models: Models, config: Config, layout: Layout, workload: Workload, stage: int) -> dict[str, float]:
    """Of one micro-batch of the longest rows; of activations as many as the schedule has under way."""
    training, student, itemsize = config.training, models.student, _itemsize(config)
    shape = TokenShape.of(student, layout, models.layers, itemsize)
    rows, width = training.micro_batch_size, _padded(workload.longest_row, training.pad_to_multiple)
    tokens = 2 * rows * width / layout.context
    num_layers = student.num_hidden_layers // (layout.pipeline * layout.chunks)
    num_chunks = in_flight(layout, stage, num_micro_batches(config, layout))
    # cosines and sines, of queries and of keys: RoPE is not fused, whatever the layers
    angles = 4 * student.head_dim * itemsize * width / layout.context
    by_layer = shape.layer_bytes(training.recompute) * tokens + (0 if training.recompute == "full" else angles)
    activations = num_chunks * num_layers * by_layer
    one_layer = shape.layer_bytes() * tokens if training.recompute == "full" else 0.0
    is_last = stage == layout.pipeline - 1
    padded = models.padded_vocab_size(config)
    vocabulary = padded // layout.tensor
    trained = rows * _trained_positions(workload) / layout.context
    parts = {"activations": activations, "logits": 0.0, "output gradient": 0.0}
    weight_gradient = itemsize * largest(student, layout, padded, stage)
    parts["backward"] = one_layer + shape.backward_work_bytes() * tokens + weight_gradient
    if is_last:
        parts["activations"] += (shape.final_norm_bytes() + shape.itemsize * student.hidden_size) * tokens
        parts["logits"] = _chunk_bytes(config, vocabulary) + trained * student.hidden_size * (4 + itemsize)
        kept = vocabulary * student.hidden_size * itemsize
        parts["output gradient"] = vocabulary * student.hidden_size * 4 + (kept if itemsize < 4 else 0)
        parts["backward"] += kept + trained * student.hidden_size * 4
    return parts


def _teacher_parts(models: Models, config: Config, layout: Layout, workload: Workload, stage: int) -> dict[str, float]:
    if models.teacher is None:
        return {"targets": 0.0, "teacher forward": 0.0, "offloaded teacher": 0.0}
    itemsize, rows = _itemsize(config), config.training.micro_batch_size
    shape = TokenShape.of(models.teacher, layout, models.layers, itemsize)
    width = _padded(workload.longest_row, config.training.pad_to_multiple)
    streams = 2 if config.teacher.fill == "argmax" else 1
    targets = 0.0
    if stage == layout.pipeline - 1:
        rows_of_rank = rows * num_micro_batches(config, layout)
        # a global batch of longest responses would be rare, but its micro-batches' targets wait together
        targets = rows_of_rank * _trained_positions(workload) / layout.context * models.teacher.hidden_size * itemsize
    return {
        "targets": targets,
        "teacher forward": streams * rows * width / layout.context * shape.forward_work_bytes(),
        "offloaded teacher": itemsize * _teacher_elements(models, config, layout, stage, is_resident=False),
    }


def _decoding_bytes(models: Models, config: Config, layout: Layout) -> float:
    """Activations of the widest forward, and the logits of what is drawn together: in `dtype` and float32, as
    probabilities and a sorted copy."""
    shape = TokenShape.of(models.student, layout, models.layers, _itemsize(config))
    num_rows = models.padded_vocab_size(config) // layout.tensor
    logits = drawn_together(num_rows) * num_rows
    return config.rollout.max_tokens_in_flight * shape.forward_work_bytes() + logits * (_itemsize(config) + 12)


def _cache_bytes_per_token(student: Qwen3Architecture, layout: Layout, itemsize: int) -> float:
    num_layers = student.num_hidden_layers // layout.pipeline
    return 2 * num_layers * student.num_key_value_heads // layout.tensor * student.head_dim * itemsize


def _chunk_bytes(config: Config, vocabulary: int) -> float:
    divergence = config.divergence
    buffers = 5 if divergence.teacher_top_p < 1 else CHUNK_BUFFERS[divergence.kind]
    return 4.0 * buffers * divergence.chunk_size * vocabulary


def _trained_positions(workload: Workload) -> float:
    """Of the longest response, all of them: the first denoising step of every block may be drawn."""
    return workload.longest_response


def num_micro_batches(config: Config, layout: Layout) -> int:
    """Of a global batch on one data-parallel rank, where all rows of a response count."""
    rows_of_all = config.training.global_batch_size * rows_per_response(config)
    return max(1, rows_of_all // (config.training.micro_batch_size * layout.data_parallel_size))


def _padded(num_tokens: int, multiple: int) -> int:
    return -(-num_tokens // multiple) * multiple


def _itemsize(config: Config) -> int:
    return 4 if config.precision.dtype == "float32" else 2
