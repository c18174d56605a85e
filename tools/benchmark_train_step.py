"""Time and memory of one row's training step, against the same step written plainly.

    python tools/benchmark_train_step.py

prints one JSON line per variant and one with their ratio:

    {"variant": "ours", "seconds": 2.541, "step_mib": 578.7, "peak_mib": 1325.2, "loss": 0.99907, ...}
    {"variant": "naive", "seconds": 7.092, "step_mib": 3356.5, "peak_mib": 4038.9, "loss": 0.99907, ...}
    {"ratio": "naive to ours", "speedup": 2.79, "speedup_of_fastest": 2.86, "step_memory_share": 0.172, ...}

A step is the teacher's forward, the student's forward, the loss and the backward; no optimizer. The row is a random
prompt and response, and its state is drawn by `select_states` from a rollout of one token per denoising step, so about
five eighths of the response are trained. What ours gains depends on that share, since it makes logits there only: with
the whole response trained the speedup is about half of it. Memory depends on `--chunk-size`, the positions whose logits
exist at one time; from the number of trained positions on (462 here) there is only one chunk.

- `ours` is what a training run does: Megatron models, `teacher_hidden_states`, the `aten` attention and
  `distillation_loss`, with default settings and full activation recompute (`student.transformer`), as runs
  on long rows have it. Without recompute a step takes about 0.9 of the time and 300 MiB more.
- `naive` has the quantities of a straightforward implementation. The teacher reads two streams (2T tokens) under a
  dense mask, and so does the student; both make the logits of all T positions of the noisy stream and take a
  log-softmax of them; autograd makes the backward. It is not slow on purpose: `transformers`' Qwen3 with PyTorch's
  fused `sdpa` attention and no cache, masks made beforehand, output layers on one stream only, the mask token left out
  by a view, PyTorch's `kl_div` on log-probabilities, logits freed after their log-softmax, the teacher under `no_grad`.

Both have the same weights and the same state, and report the same loss and gradient norm. All is float32 on the CPU.
Every variant runs in processes of its own, taking turns; a process takes one warm-up step, then `--repeats` timed ones.
`peak_mib` is the largest resident memory of the process, `step_mib` that minus what it held before the first step
(weights, libraries); at toy sizes the building of the models may decide it.

Legend: `B` sequences (one here), `T` tokens of the terminal sequence, `V` vocabulary, `H` hidden size, `N` trained
positions, `M` blocks, `K` positions of a block.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_opdlm.observability.measurement import measure_in_process, peak_mib, ratio, summarise

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from transformers import Qwen3ForCausalLM

    from megatron_opdlm.diffusion.states import OnPolicyStates
    from megatron_opdlm.models.pipeline import PipelineModel

BLOCK_SIZE = 4
VARIANTS = ("ours", "naive")
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
STUDENT_SEED, TEACHER_SEED, ROW_SEED = 1, 2, 3


@dataclass(frozen=True)
class Sizes:
    """The row and the model. Four query heads share two key-value heads; tied embeddings; the same for both models."""

    prompt_length: int = 256
    response_length: int = 768
    vocab_size: int = 151936
    """With the mask token, which is the last one."""
    hidden_size: int = 256
    num_layers: int = 4
    chunk_size: int | None = None
    """Of ours: `divergence.chunk_size`; by default the package's own."""


class Variant(NamedTuple):
    """A way to compute the step."""

    student: torch.nn.Module
    loss: Callable[[OnPolicyStates], torch.Tensor]
    """The teacher's and the student's forward; the backward is the caller's."""


def main() -> None:
    """Measures one variant in this process (`--once`) or both in processes of their own."""
    parser = _build_parser()
    arguments = parser.parse_args()
    sizes = Sizes(**{field.name: getattr(arguments, field.name) for field in fields(Sizes)})
    for rule, holds in _rules(sizes, arguments).items():
        if not holds:
            parser.error(rule)
    if arguments.once:
        import torch

        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(arguments.variant, sizes, arguments.repeats)))
        return
    variants = VARIANTS if arguments.variant is None else (arguments.variant,)
    rounds = [[_measure_in_process(variant) for variant in variants] for _ in range(arguments.rounds)]
    summaries = [summarise(list(runs)) for runs in zip(*rounds, strict=True)]
    for line in summaries if arguments.variant else [*summaries, compare(*summaries)]:
        print(json.dumps(line), flush=True)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Sizes):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=int, default=field.default, help=f"default: {field.default}"
        )
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a process, after one warm-up step")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each variant; the variants take turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads; default: all")
    parser.add_argument("--variant", choices=VARIANTS, help="only this one; default: both and their ratio")
    parser.add_argument("--once", action="store_true", help="measure --variant in this process")
    return parser


def _rules(sizes: Sizes, arguments: argparse.Namespace) -> dict[str, bool]:
    num_tokens = sizes.prompt_length + sizes.response_length
    counts = [*asdict(sizes).values(), arguments.repeats, arguments.rounds, arguments.threads]
    return {
        "all sizes and counts must be at least 1": min(count for count in counts if count is not None) >= 1,
        f"prompt and response together ({num_tokens}) must be whole blocks of {BLOCK_SIZE}": num_tokens % BLOCK_SIZE
        == 0,
        f"--vocab-size ({sizes.vocab_size}) must leave a token besides the mask token": sizes.vocab_size >= 2,
        f"--hidden-size ({sizes.hidden_size}) must be a multiple of 8": sizes.hidden_size % 8 == 0,
        "--once measures one --variant, so name it": arguments.variant is not None or not arguments.once,
    }


def _measure_in_process(variant: str) -> dict:
    """`measure` in a fresh process with this one's flags; of two equal flags the later one wins."""
    return measure_in_process(Path(__file__), [*sys.argv[1:], "--variant", variant, "--once"])


def measure(variant: str, sizes: Sizes, repeats: int) -> dict:
    """Seconds of each timed step, memory in MiB, and what the last step computed."""
    import psutil

    states = one_row(sizes)
    with tempfile.TemporaryDirectory() as folder:
        student, compute_loss = build_ours(sizes, Path(folder)) if variant == "ours" else build_naive(sizes)
    before, seconds = psutil.Process().memory_info().rss / 2**20, []
    for _ in range(1 + repeats):
        student.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss = compute_loss(states)
        loss.backward()
        seconds.append(time.perf_counter() - start)
    peak = peak_mib()
    return {
        "variant": variant,
        "seconds": seconds[1:],
        "step_mib": peak - before,
        "peak_mib": peak,
        "loss": loss.item(),
        "grad_norm": gradient_norm(student),
        "trained_positions": int(states.num_trained_B.sum()),
    }


def gradient_norm(model: torch.nn.Module) -> float:
    """Over all parameters; both variants hold the same numbers, in tensors of other shapes."""
    return sum(float(x.grad.double().square().sum()) for x in model.parameters() if x.grad is not None) ** 0.5


def compare(ours: dict, naive: dict) -> dict:
    """The line with the ratios."""
    return {"ratio": "naive to ours", **ratio(ours, naive)}


# --- what both variants compute ---------------------------------------------------------------------------------------


def one_row(sizes: Sizes) -> OnPolicyStates:
    """The state of a random row whose rollout committed the tokens of each block one by one, in random order."""
    import torch

    from megatron_opdlm.diffusion.states import select_states
    from megatron_opdlm.diffusion.trajectory import Trajectory

    generator = torch.Generator().manual_seed(ROW_SEED)
    num_tokens, mask_token_id = sizes.prompt_length + sizes.response_length, sizes.vocab_size - 1
    order_MK = torch.rand(num_tokens // BLOCK_SIZE, BLOCK_SIZE, generator=generator).argsort(dim=1)
    trajectory = Trajectory(
        prompt_id=0,
        sample_index=0,
        prompt_length=sizes.prompt_length,
        block_size=BLOCK_SIZE,
        terminal_ids_T=torch.randint(mask_token_id, (num_tokens,), generator=generator),
        step_map_R=1 + order_MK.flatten()[sizes.prompt_length :],
        log_probs_R=torch.zeros(sizes.response_length),
        response_length=sizes.response_length,
        stop_reason="length",
        domain="",
    )
    return select_states(
        [trajectory],
        block_size=BLOCK_SIZE,
        mask_token_id=mask_token_id,
        end_token_ids=(),
        pad_token_id=0,
        seed=ROW_SEED,
        step=0,
    )


def random_qwen3(sizes: Sizes, seed: int) -> Qwen3ForCausalLM:
    """Hugging Face's model with weights drawn from `seed`, of a scale that gives logits of about unit variance."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        **{"vocab_size": sizes.vocab_size, "hidden_size": sizes.hidden_size, "num_hidden_layers": sizes.num_layers},
        intermediate_size=3 * sizes.hidden_size,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=sizes.hidden_size // 4,
        max_position_embeddings=sizes.prompt_length + sizes.response_length,
        rope_theta=1e6,
        tie_word_embeddings=True,
        initializer_range=sizes.hidden_size**-0.5,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config)


# --- ours -------------------------------------------------------------------------------------------------------------


def build_ours(sizes: Sizes, folder: Path) -> Variant:
    """The package's models and loss. The weights go through Hugging Face folders, as in a run."""
    import torch

    from megatron_opdlm.config.schema import DivergenceConfig, ParallelConfig, RolloutConfig
    from megatron_opdlm.distillation.loss import distillation_loss
    from megatron_opdlm.distillation.teacher import teacher_hidden_states
    from megatron_opdlm.models.attention.backend import AttentionCase, build_backend
    from megatron_opdlm.models.attention.core_attention import BlockDiffusionCoreAttention, CausalCoreAttention
    from megatron_opdlm.parallel.initialize import initialize
    from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard

    groups = initialize(ParallelConfig(), seed=0)
    backend = build_backend("aten", AttentionCase(device_type="cpu"))
    attention = partial(BlockDiffusionCoreAttention, backend=backend, block_size=BLOCK_SIZE)
    student = _megatron_model(random_qwen3(sizes, STUDENT_SEED), attention, folder / "student", groups, RECOMPUTE)
    teacher = _megatron_model(random_qwen3(sizes, TEACHER_SEED), CausalCoreAttention, folder / "teacher", groups, {})
    teacher.freeze()
    vocabulary = {"vocab_size": sizes.vocab_size, "mask_token_id": sizes.vocab_size - 1}
    shard = VocabularyShard(first=0, num_rows=len(student.output_weight), group=groups.tp, **vocabulary)
    divergence = DivergenceConfig() if sizes.chunk_size is None else DivergenceConfig(chunk_size=sizes.chunk_size)
    positions_T = torch.arange(sizes.prompt_length + sizes.response_length)

    def loss(states: OnPolicyStates) -> torch.Tensor:
        (targets_NH,) = teacher_hidden_states(teacher, [states])
        hidden_TBH = student(torch.cat([states.clean_ids_BT, states.noisy_ids_BT]), positions_T, states.lengths_B)
        rollout = RolloutConfig(block_size=BLOCK_SIZE)
        return distillation_loss(
            student, teacher, hidden_TBH, targets_NH, states, shard, divergence, rollout, "sequence"
        )[0]

    (whole,) = student.chunks
    return Variant(whole, loss)


def _megatron_model(
    model: Qwen3ForCausalLM, core_attention: Callable, folder: Path, groups: ProcessGroupCollection, overrides: dict
) -> PipelineModel:
    """The same model on Megatron."""
    from transformers.utils.logging import disable_progress_bar

    from megatron_opdlm.checkpointing.hf_qwen3 import load_hf_weights
    from megatron_opdlm.config.schema import ParallelConfig
    from megatron_opdlm.models.build import build_model
    from megatron_opdlm.models.qwen3 import read_architecture

    disable_progress_bar()
    model.save_pretrained(folder)
    architecture, parallel = read_architecture(folder), ParallelConfig()
    num_rows = architecture.padded_vocab_size(parallel.make_vocab_size_divisible_by, 1)
    settings = {"parallel": parallel, "dtype": "float32", "padded_vocab_size": num_rows, "overrides": overrides}
    built = build_model(architecture, core_attention, **settings)
    load_hf_weights(built, folder, architecture, groups)
    return built


# --- naive ------------------------------------------------------------------------------------------------------------


def build_naive(sizes: Sizes) -> Variant:
    """Both models over 2T tokens, all logits of the noisy half, autograd."""
    import torch
    import torch.nn.functional as F

    student, teacher = random_qwen3(sizes, STUDENT_SEED), random_qwen3(sizes, TEACHER_SEED).eval()
    num_tokens = sizes.prompt_length + sizes.response_length
    student_mask, teacher_mask = two_stream_mask(num_tokens, False), two_stream_mask(num_tokens, True)

    def log_probs_TV(model: Qwen3ForCausalLM, streams: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(num_tokens).repeat(2)[None]
        ids = torch.cat(streams, dim=1)
        hidden = model.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        # The mask token is the last row: no distribution gives it any probability.
        return F.linear(hidden[0, num_tokens:], model.lm_head.weight[:-1]).log_softmax(dim=-1)

    def loss(states: OnPolicyStates) -> torch.Tensor:
        clean_BT, is_trained_T = states.clean_ids_BT, states.is_trained_BT[0]
        with torch.no_grad():
            targets_TV = log_probs_TV(teacher, [clean_BT, clean_BT], teacher_mask)
        student_TV = log_probs_TV(student, [clean_BT, states.noisy_ids_BT], student_mask)
        # Output i - 1 of the teacher predicts position i.
        divergence_T = F.kl_div(student_TV[1:], targets_TV[:-1], reduction="none", log_target=True).sum(dim=-1)
        return divergence_T[is_trained_T[1:]].mean()

    return Variant(student, loss)


def two_stream_mask(num_tokens: int, is_causal: bool) -> torch.Tensor:
    """bool [1, 1, 2T, 2T]: earlier clean blocks, and one's own block in one's own stream, all of it or causally.

    Causally it is what makes the second stream of a teacher see, at every position, what a causal model sees.
    """
    import torch

    position, is_noisy = torch.arange(num_tokens).repeat(2), torch.arange(2 * num_tokens) >= num_tokens
    block = position // BLOCK_SIZE
    is_earlier_clean_block = (block < block[:, None]) & ~is_noisy
    is_own_block = (block == block[:, None]) & (is_noisy == is_noisy[:, None])
    if is_causal:
        is_own_block &= position <= position[:, None]
    return (is_earlier_clean_block | is_own_block)[None, None]


if __name__ == "__main__":
    main()
