"""What `benchmark_rollout.py` compares: our engine in several forms and a plain sampler, with the same prompts.

decode = build_ours("examples/quickstart/teacher", Sizes(), "ours")
decode(make_prompts("examples/quickstart/teacher", Sizes())).responses
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from megatron_opdlm.rollout.statistics import RolloutStatistics

ENGINE_SETTINGS = {
    "ours": {},
    "ours_on_ranks": {},
    "one_at_a_time": {"batch_size": 1},
    "teacher_autoregressive": {"block_size": 1, "denoising_steps_per_block": 1, "logit_shift": "next_token"},
    "pipeline_1": {"pipeline_micro_groups": 1},
    "pipeline_2": {"pipeline_micro_groups": 2},
}
"""Variant of our engine -> what its `rollout` settings change."""
NUM_STAGES = 2
"""Of a pipeline."""
PIPELINE_VARIANTS = ("pipeline_2", "pipeline_1")


@dataclass(frozen=True)
class Sizes:
    """What is decoded, and how."""

    num_prompts: int = 128
    new_tokens: int = 64
    block_size: int = 4
    denoising_steps: int = 4
    """Per block; one token per step if there are as many as positions."""
    max_terms: int = 4
    """A question has between two numbers and this many: more make prompts differ more in length."""
    temperature: float = 0.0
    stop_at_end_tokens: bool = False
    """Responses end there, as in training, and have `new_tokens` at most; otherwise all have as many."""


class Figures(NamedTuple):
    """What decoding took."""

    num_forwards: int
    """Of the model."""
    num_sequence_steps: int
    """Denoising steps, summed over the sequences."""
    num_query_tokens: int
    """Tokens of sequences that take part, through all forwards."""
    num_clean_tokens: int
    """Those of them that are read for the cache's sake: prefill and commits."""
    num_pairs: int
    """Query-key pairs of attention, per layer and head."""
    num_hidden_pairs: int
    """Those of them that a mask hides."""


class Decoded(NamedTuple):
    """The responses to all prompts."""

    responses: list[list[int]]
    """`Sizes.new_tokens` ids each, or fewer where end tokens count."""
    num_written: int
    """Tokens that were decoded, with those that fill up the last blocks."""
    figures: Figures
    bubble: float | None = None


Decoder = Callable[[list[list[int]]], Decoded]


def make_prompts(hf: str, sizes: Sizes) -> list[list[int]]:
    """The ids of sums to solve, always the same ones. Numbers of any length let them end anywhere in a block."""
    from megatron_opdlm.data.tokenizer import load_tokenizer

    tokenizer, draw, prompts = load_tokenizer(hf), random.Random(0), []
    for _ in range(sizes.num_prompts):
        numbers = [str(draw.randrange(10 ** draw.randint(1, 3))) for _ in range(draw.randint(2, sizes.max_terms))]
        question = f"State the final answer to the following arithmetic problem: {' + '.join(numbers)} ="
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return prompts


# --- ours -------------------------------------------------------------------------------------------------------------


def build_ours(hf: str, sizes: Sizes, variant: str) -> Decoder:
    """The engine with the student, or with the teacher under the student's attention in blocks of one token."""
    from megatron_opdlm.checkpointing.student_and_teacher import build_student, open_student, padded_vocab_size
    from megatron_opdlm.config.schema import (
        AttentionConfig,
        Config,
        ParallelConfig,
        PrecisionConfig,
        RolloutConfig,
        StudentConfig,
    )
    from megatron_opdlm.data.prompts import Prompt
    from megatron_opdlm.parallel.initialize import initialize
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    settings = {"block_size": sizes.block_size, "denoising_steps_per_block": sizes.denoising_steps}
    settings |= {"batch_size": sizes.num_prompts, "temperature": sizes.temperature} | ENGINE_SETTINGS[variant]
    config = Config(
        student=StudentConfig(hf=hf),
        parallel=ParallelConfig(pipeline_model_parallel_size=NUM_STAGES if variant in PIPELINE_VARIANTS else 1),
        precision=PrecisionConfig(dtype="float32"),
        attention=AttentionConfig(backend="dense"),  # of training; decoding has its own
        rollout=RolloutConfig(remasking_strategy="low_confidence_static", **settings),
    )
    groups, source = initialize(config.parallel, seed=0), open_student(config.student)
    model = build_student(source, config, groups, padded_vocab_size(config, source.architecture))
    special = source.special if sizes.stop_at_end_tokens else replace(source.special, end_token_ids=())
    engine = RolloutEngine(model, config.rollout, special, seed=0, groups=groups)

    def decode(prompts: list[list[int]]) -> Decoded:
        tasks = [RolloutTask(Prompt(place, tuple(ids)), sizes.new_tokens) for place, ids in enumerate(prompts)]
        trajectories = engine.generate(tasks, step=0)
        return Decoded(
            responses=[trajectory.response_ids.tolist() for trajectory in trajectories],
            num_written=sum(len(trajectory.step_map_R) for trajectory in trajectories),
            figures=read_figures(engine.statistics),
            bubble=engine.statistics.pipeline_bubble,
        )

    return decode


def read_figures(statistics: RolloutStatistics) -> Figures:
    """Of a rollout."""
    return Figures(**{name: getattr(statistics, name) for name in Figures._fields})


# --- plain ------------------------------------------------------------------------------------------------------------


def build_plain(hf: str, sizes: Sizes) -> Decoder:
    """The sampler with the weights of the folder, whose embedding must have a row for the mask token."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from megatron_opdlm.config.schema import StudentConfig
    from megatron_opdlm.data.tokenizer import add_mask_token, end_token_ids, load_tokenizer
    from tools.plain_sampler import PlainSampler

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="sdpa").eval().to(device)
    tokenizer = load_tokenizer(hf)
    mask_token_id = add_mask_token(tokenizer, StudentConfig().mask_token)
    if mask_token_id >= model.config.vocab_size:
        raise ValueError(f"--hf ({hf}) must have a row for the mask token, id {mask_token_id}, in its embedding")
    settings = {
        "mask_token_id": mask_token_id,
        "block_size": sizes.block_size,
        "denoising_steps": sizes.denoising_steps,
        "new_tokens": sizes.new_tokens,
        "temperature": sizes.temperature,
        "end_token_ids": end_token_ids(tokenizer, hf) if sizes.stop_at_end_tokens else (),
    }

    def decode(prompts: list[list[int]]) -> Decoded:
        own = prompts[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else prompts
        sampler = PlainSampler(model, own, **settings)
        responses = sampler.decode()
        return Decoded(responses, sampler.num_written, Figures(**sampler.counts))

    return decode
