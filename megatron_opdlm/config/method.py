"""The settings of the method: how the student decodes, in which states it learns, from what, and by which divergence.

Part of `config.schema`, where all sections come together; other modules take the sections from there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RemaskingStrategy = Literal["low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded"]
LogitShift = Literal["none", "next_token"]
CurriculumShape = Literal["linear", "sine", "cosine"]
StateSelection = Literal["one_per_block", "all_steps", "random_mask"]
ObjectiveName = Literal["on_policy_distillation", "sft", "lift"]
OffPolicyDecay = Literal["constant", "linear", "cosine"]
NoiseLevel = Literal["block", "sequence"]
LossWeight = Literal["none", "1/t"]
Normaliser = Literal["tokens", "response", "masked"]
SftPreset = Literal["none", "sdar", "fast_dllm_v2", "dllm", "llada2"]
DivergenceKind = Literal["forward_kl", "reverse_kl", "mixture", "jsd"]
TopKTail = Literal["none", "renormalize", "bucket"]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the student decodes."""

    block_size: int = 4
    """Consecutive positions of the absolute grid that are denoised together (K)."""
    denoising_steps_per_block: int = 4
    """At most this many denoising steps per block (S); not more than `block_size`."""
    remasking_strategy: RemaskingStrategy = "low_confidence_dynamic"
    """Which masked positions a denoising step commits: the most confident; all that are confident enough; the first
    from the left; those of least entropy, within a budget. The last step of a block commits all that are left."""
    dynamic_threshold: float = 0.9
    """`low_confidence_dynamic` commits every position whose confidence is above this."""
    entropy_bound: float = 0.35
    """`entropy_bounded` commits positions by rising entropy while these add up to at most this, in nats, and one at
    least. Of the distribution that is drawn from, after temperature, top-k and top-p: at temperature 0 it is zero."""
    logit_shift: LogitShift = "none"
    """Which of the student's outputs predicts a position, while it decodes and while it trains: `none`, its own;
    `next_token`, the one at the position before, as in the autoregressive model (Dream, Fast-dLLM v2)."""
    temperature: float = 1.0
    """Of the distribution that tokens are drawn from; 0 takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with at least this probability."""
    max_new_tokens: int = 4000
    """Longest response, in tokens; rounded up to the block grid while decoding."""
    max_new_tokens_by_domain: dict[str, int] = field(default_factory=dict)
    """Lower caps for single domains, e.g. `{math: 4096, code: 2048}`."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Token ids that end a response besides the tokenizer's end token."""
    num_responses_per_prompt: int = 1
    """Responses to each prompt of a step, each with random numbers of its own."""
    batch_size: int = 128
    """Sequences that one data-parallel rank decodes at a time; when one is done, the next takes its place."""
    max_tokens_in_flight: int = 8192
    """Most tokens of one forward. A sequence that denoises takes a block, or two where one has just become clean; the
    rest goes to prompts, in chunks. At least two blocks."""
    cache_gib: float | None = None
    """Memory for keys and values on each rank, in GiB; null for as much as `batch_size` sequences need, within what is
    free. Where it is too little, the sequence that began last makes room, and goes on later."""
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    """Kernel that attends to the cache: `flash`, the flash-attention package's, for 16-bit models on GPUs; `sdpa`,
    PyTorch's; `auto`, `flash` where it can serve, else `sdpa`. Training has its own, `attention.backend`."""
    cuda_graphs: bool = True
    """Replay forwards of up to two blocks per sequence as CUDA graphs, which saves the time to launch their kernels one
    by one. Only with `flash`, for dense models without pipeline parallelism; elsewhere it has no effect."""
    pipeline_micro_groups: int | None = None
    """Under pipeline parallelism, groups that these sequences are split into, so that a stage can work on one while the
    next stage works on another; null for as many as there are stages."""

    @property
    def reads_block(self) -> bool:
        """Whether a denoising step reads the block it denoises: not where that is one token, predicted by the one
        before it, so that nobody asks for what stands there. Then decoding is autoregressive."""
        return self.block_size > 1 or self.logit_shift == "none"


@dataclass(frozen=True, kw_only=True)
class StatesConfig:
    """Which partly masked views of what the student wrote it is trained in."""

    selection: StateSelection = "one_per_block"
    """`one_per_block`: of each block one of the states it was decoded through, at random; all blocks of a response in
    one row. `all_steps`: all of these states, in up to `rollout.denoising_steps_per_block` rows per response.
    `random_mask`: masks at random, whatever the student visited, as an ablation: not on-policy."""
    shrink: int = 1
    """`all_steps` takes only every so manyth denoising step of a block, from its first one."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the student learns from: a teacher, on what it wrote itself, or given responses."""

    name: ObjectiveName = "on_policy_distillation"
    """`on_policy_distillation`: the teacher's distribution where the student has been. `sft`: cross-entropy on the
    `response` of each row, at random masks. `lift`: the same at masks that are hard or easy to learn by turns. The last
    two need no teacher."""
    off_policy_fraction: float = 0.0
    """Part of the responses that the student did not write itself, distilled at random masks."""
    off_policy_decay: OffPolicyDecay = "constant"
    """How that part goes down to nothing over `off_policy_steps`; `constant` leaves it as it is."""
    off_policy_steps: int | None = None
    """Training steps until nothing is off-policy; null for those of the run."""
    off_policy_source: Literal["teacher", "data"] = "teacher"
    """Who wrote these responses: the teacher, who decodes them one token after the other, or the rows' `response`."""
    preset: SftPreset = "none"
    """Do `sft` as another project does. Decides all the settings below, which must then be left alone, and wants its
    own `rollout.logit_shift`. The table is in `megatron_opdlm.config.sft_presets`."""
    noise_level: NoiseLevel = "block"
    """What shares a noise level t, the probability that a position is masked: each block has its own, or the row."""
    noise_low: float = 0.001
    """Lowest noise level; t is uniform between this and `noise_high`."""
    noise_high: float = 1.0
    """Highest noise level."""
    loss_weight: LossWeight = "none"
    """Of the cross-entropy at a position: 1, or one over the noise level it was masked with."""
    normaliser: Normaliser = "tokens"
    """What the weighted sum over a global batch is divided by: `tokens`, the response tokens of all its rows;
    `response`, each row by its own response tokens, then the number of rows; `masked`, the trained positions."""
    complementary: bool = False
    """Train each row a second time with exactly the other positions masked."""
    train_fill: bool = False
    """Train the end tokens too that fill up the last block behind the response's own."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the run has a teacher."""
        return self.name == "on_policy_distillation"

    @property
    def needs_responses(self) -> bool:
        """Whether each row of the data must have a `response`."""
        return not self.needs_teacher or (self.off_policy_fraction > 0 and self.off_policy_source == "data")


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """How far the student q is from the teacher's target distribution p at each trained position."""

    kind: DivergenceKind = "forward_kl"
    """`forward_kl`: KL(p || q), teacher || student. `reverse_kl`: KL(q || p), student || teacher. `mixture`: both, by
    `reverse_weight`. `jsd`: the generalised Jensen-Shannon divergence alpha KL(p || m) + (1 - alpha) KL(q || m) from
    the mixture m = alpha p + (1 - alpha) q, alpha of `jsd_alpha`."""
    reverse_weight: float = 0.5
    """w of `mixture`: (1 - w) KL(p || q) + w KL(q || p)."""
    jsd_alpha: float = 0.5
    """alpha of `jsd`, between 0 and 1. At 0.5 teacher and student may change places and nothing changes. Small values
    resemble alpha KL(p || q), values near 1 resemble (1 - alpha) KL(q || p)."""
    top_k: int = 0
    """Restrict the divergence to the k tokens that the teacher finds most likely; 0 for the full vocabulary."""
    top_k_tail: TopKTail = "none"
    """What becomes of all other tokens under `top_k`. `none`: they are left out of the sum, which is un-normalised, as
    in the paper; `forward_kl` only. `renormalize`: both distributions are divided by their probability of the k tokens.
    `bucket`: all others are one more outcome."""
    teacher_temperature: float = 1.0
    """Divides the teacher's logits; the filters follow in this order."""
    teacher_top_k: int = 0
    """Keep the k most likely tokens in the target distribution and renormalise it; 0 for all, 1 for the argmax."""
    teacher_top_p: float = 1.0
    """Keep the smallest set of most likely tokens with at least this part of the probability that is left."""
    teacher_min_p: float = 0.0
    """Keep tokens with at least this many times the probability of the most likely one."""
    chunk_size: int = 128
    """Trained positions whose logits exist at one time. Three float32 buffers of this many times the vocabulary (per
    tensor-parallel rank) are alive, four under `mixture` and `jsd`, about five under `teacher_top_p`; larger chunks
    read the output layer less often."""


@dataclass(frozen=True, kw_only=True)
class CurriculaConfig:
    """Schedules over training steps."""

    length_start: int | None = None
    """`rollout.max_new_tokens` at the first step; null for no length curriculum."""
    length_ramp_steps: int = 100
    """Steps until the full length is reached."""
    length_shape: CurriculumShape = "linear"
    """linear: p; sine: sin(pi p / 2); cosine: 1 - cos(pi p / 2)."""
    threshold_start: float | None = None
    """`rollout.dynamic_threshold` at the first step; null for no threshold curriculum."""
    threshold_hold_steps: int = 0
    """Steps that it holds, before it goes to its full value in a straight line."""
    threshold_ramp_steps: int = 100
    """Steps that it takes from there to its full value."""
