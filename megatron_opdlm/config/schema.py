"""Every setting of a run, in one torch-free place.

A recipe is YAML with these sections; a flag is the dotted path of a key (`--rollout.block_size 8`); code reads the
attribute of the same name (`config.rollout.block_size`). Each default stands here and nowhere else. Rules that tie
several settings together are checked once, in `megatron_opdlm.config.check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RemaskingStrategy = Literal["low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded"]
LogitShift = Literal["none", "next_token"]
CurriculumShape = Literal["linear", "sine", "cosine"]
TeacherFill = Literal["terminal", "argmax"]
AdaptedModule = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
StateSelection = Literal["one_per_block", "all_steps", "random_mask"]
ObjectiveName = Literal["on_policy_distillation", "sft", "lift"]
OffPolicyDecay = Literal["constant", "linear", "cosine"]
NoiseLevel = Literal["block", "sequence"]
LossWeight = Literal["none", "1/t"]
Normaliser = Literal["tokens", "response", "masked"]
SftPreset = Literal["none", "sdar", "fast_dllm_v2", "dllm", "llada2"]
Fp8Recipe = Literal["off", "delayed", "tensorwise", "blockwise"]
Recompute = Literal["none", "selective", "full"]
DivergenceKind = Literal["forward_kl", "reverse_kl", "mixture", "jsd"]
TopKTail = Literal["none", "renormalize", "bucket"]
LossReduction = Literal["sequence", "token"]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The block-diffusion model being trained. Give `hf` or `checkpoint`."""

    hf: str | None = None
    """Hugging Face folder to start from: a Qwen3, a Qwen3-MoE, a Qwen2.5, or an SDAR or TraDo, which denoise blocks
    already. A mask token is added where the tokenizer has none."""
    checkpoint: str | None = None
    """Megatron checkpoint folder to start from, as `tools/convert_hf_to_megatron.py --role student` writes it."""
    mask_token: str = "<|MASK|>"
    """Text of the mask token in the student's tokenizer."""
    transformer: dict = field(default_factory=dict)
    """Overrides of Megatron's TransformerConfig, by its own field names."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen autoregressive model. Give `hf` or `checkpoint`. It may be of another size than the student."""

    hf: str | None = None
    """Hugging Face folder of a Qwen3, Qwen3-MoE or Qwen2.5."""
    checkpoint: str | None = None
    """Megatron checkpoint folder, as `tools/convert_hf_to_megatron.py --role teacher` writes it."""
    transformer: dict = field(default_factory=dict)
    """Overrides of Megatron's TransformerConfig, by its own field names."""
    fill: TeacherFill = "terminal"
    """What the teacher reads before a position, inside its block: the tokens that the student finally wrote, or those
    that it finds most likely in the state being trained (`argmax`, an ablation; costs a forward of the student and
    doubles the teacher's)."""
    offload: bool = False
    """Keep the weights, all but the output layer's, in pinned host memory, and on the GPU only while the teacher's
    forward runs. Frees their memory for the student and its rollout; costs a copy of the rank's shard to the GPU at
    every optimizer step, and up to twice as much host memory, of which PyTorch pins powers of two."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: the student's own weights stay as they are, and only what is added to them is trained."""

    rank: int = 0
    """Inner size of the adapters; 0 trains all weights. Checkpoints then hold the adapters alone, and need the folder
    of `student.hf` or `student.checkpoint` to be read; conversion to Hugging Face merges them. Needs Megatron's local
    layers (`student.transformer.transformer_impl`)."""
    alpha: float = 32.0
    """What an adapter adds is multiplied by this over `rank`."""
    target_modules: list[AdaptedModule] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )
    """The linear layers of each transformer layer that get one; in a mixture of experts those of attention only."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the two models are spread over the ranks; data parallelism takes what is left."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each weight matrix."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are cut into, each on its own ranks. Must divide the number of layers of both models."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers per stage, at least 2, for Megatron's interleaved schedule, which idles less and sends more.
    Then the micro-batches of a global batch on a data-parallel rank must be a multiple of the stages, and they are all
    padded to the longest."""
    context_parallel_size: int = 1
    """Ranks that share each sequence while the models train, for responses whose activations do not fit one: each has a
    part of the positions, and in attention a part of the heads. Times the tensor-parallel size it must divide the
    number of key-value heads of both models. These ranks decode different prompts."""
    sequence_parallel: bool = False
    """Shard the activations between tensor-parallel regions along the sequence. Needs a tensor-parallel size over 1."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a mixture out among them, each with whole experts. They are different
    data-parallel ranks (and tensor-parallel ones, where `expert_tensor_parallel_size` is smaller than that size)."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each weight matrix of an expert; must divide `tensor_model_parallel_size`, which null takes."""
    overlap_grad_reduce: bool = True
    """Add up the gradients of data-parallel ranks in buckets of parameters, each as soon as its gradients are there,
    while the backward pass goes on; otherwise all at its end. Costs no memory."""
    overlap_param_gather: bool = True
    """Collect the updated weights from data-parallel ranks while the teacher runs on the next global batch; otherwise
    before anything else goes on. The last ones of a step are waited for, because the rollout needs them."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    distributed_timeout_minutes: float = 10.0
    """A collective that takes longer than this ends the run with an error."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Parameters and activations. Under bfloat16 the optimizer keeps float32 main parameters and gradients."""
    fp8: Fp8Recipe = "off"
    """FP8 products in the student's linear layers while it trains, forward and backward, by Transformer Engine; rollout
    and evaluation decode in `dtype`. The scales: `delayed` from the maxima of earlier micro-batches (the first one of a
    run has scales of one), `tensorwise` from each tensor itself, `blockwise` for each block of 128 values."""
    teacher_fp8: Fp8Recipe = "off"
    """The same for the teacher's forward, chosen apart from the student's; `tensorwise` or `blockwise`."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The kernel behind the student's block-diffusion attention."""

    backend: Literal["auto", "dense", "aten", "flash", "te", "flex"] = "auto"
    """`dense`: a full boolean mask, the slow oracle. `aten`, `flash`, `te`: one plain causal kernel (of PyTorch, of
    flash-attention, of Transformer Engine) plus a small in-block part, exact forward and backward. `flex`: one call of
    PyTorch's FlexAttention. `auto` takes one that serves the case and logs which; with `fp8` it takes `te`."""
    kernel: Literal["auto", "fa2", "fa3", "fa4", "cudnn", "triton"] = "auto"
    """Which kernel of the backend: `aten` has cudnn, fa2, fa3 and fa4; `flash` fa2 and fa3; `flex` triton and fa4."""
    fp8: bool = False
    """The attention products in FP8 too, by `te`, with the recipe of `precision.fp8`. The gradients of attention then
    carry a relative error of 5 to 15 %, and a resumed run finds its scales anew."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the prompts come from."""

    train_files: list[str] = field(default_factory=list)
    """JSON, JSONL or Parquet files with a `question` per row (text or chat messages)."""
    max_prompt_tokens: int = 2048
    """Longer prompts are left out and counted."""
    max_response_tokens: int = 4096
    """Rows with a longer `response`, end token included, are left out and counted, if the objective reads responses."""
    apply_chat_template: bool = True
    """Wrap each question with the tokenizer's chat template; otherwise it is tokenized as it stands."""
    enable_thinking: bool = False
    """Passed to the chat template."""


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


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a cosine schedule. Steps are optimizer steps."""

    lr: float = 1e-5
    """Highest learning rate, reached after the warm-up."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    lr_warmup_steps: int = 5
    """Optimizer steps of linear warm-up from zero."""
    lr_decay_steps: int | None = None
    """Optimizer steps over which the cosine falls; null for all of the run."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    cpu_offload_fraction: float = 0.0
    """Part of the rank's main parameters and moments, 12 bytes a parameter, that host memory holds and the CPU updates,
    to free GPU memory; costs copies of gradients and weights and the CPU's time at every optimizer step. Needs a GPU
    and `precision.dtype` bfloat16."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop: a step rolls out `num_prompts_per_step` prompts and takes one optimizer step per global batch."""

    max_steps: int = 480
    """Training steps (rollout + optimizer steps) of the run."""
    num_prompts_per_step: int = 128
    """Prompts rolled out per step, over all data-parallel ranks."""
    global_batch_size: int = 8
    """Responses per optimizer step, over all data-parallel ranks. Each is a row or, with `states.selection` all_steps,
    several."""
    micro_batch_size: int = 1
    """Rows per forward and backward on one rank."""
    recompute: Recompute = "none"
    """What the student's backward pass computes anew instead of keeping it. `selective`: the attention products, for
    back ends that keep more than a row of statistics, such as `dense`. `full`: each layer, of which only the input is
    kept; costs a second forward, a third more time. Finer choices are fields of `student.transformer`."""
    loss_reduction: LossReduction = "sequence"
    """`sequence`: the mean over a row's trained positions, then over the rows of the global batch. `token`: the mean
    over all trained positions of the global batch, so that long responses weigh more."""
    train_on_end_token: bool = False
    """Train the first end token of a response too, where the state masks it."""
    pad_to_multiple: int = 64
    """Rows of a micro-batch are padded to a multiple of this many tokens."""
    balance_rows: bool = True
    """Spread the rows of a global batch over the data-parallel ranks by their tokens; the loss stays the same."""
    seed: int = 1234
    """Of the data order, the rollouts and the states."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and when."""

    directory: str | None = None
    """Folder of the checkpoints; null for `checkpoints/` in the run directory. If it holds one, the run resumes."""
    save_interval: int = 50
    """Training steps between checkpoints; the last step is always saved. 0 saves at the end only."""
    async_save: bool = True
    """Write while training goes on, from a copy of the state in host memory; otherwise training waits for the files."""
    keep: int = 2
    """Newest checkpoints that are kept; 0 for all."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Scoring responses to tasks with known answers."""

    files: list[str] = field(default_factory=list)
    """Task files: prompt rows with `source` (a reasoning-gym data set) and the `entry` its verifier needs."""
    max_tasks: int | None = None
    """Score the first this many tasks of each file; null for all."""
    output: str | None = None
    """File for the scores and the responses, as JSON."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """The run directory and what is written there."""

    directory: str = "runs/default"
    """Run directory: `config.yaml`, `metrics.jsonl`, `checkpoints/`, `tensorboard/`, `report.html`."""
    tensorboard: bool = True
    """Write TensorBoard event files too."""
    progress_bar: bool = True
    """Show a progress bar on rank 0."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    states: StatesConfig = field(default_factory=StatesConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    curricula: CurriculaConfig = field(default_factory=CurriculaConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
