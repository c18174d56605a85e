"""Every setting of a run, in one torch-free place.

A recipe is YAML with these sections; a flag is the dotted path of a key (`--rollout.block_size 8`); code reads the
attribute of the same name (`config.rollout.block_size`). Each default stands here and nowhere else. Rules that tie
several settings together are checked once, in `megatron_opdlm.config.check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_opdlm.config.method import (
    CurriculaConfig,
    DivergenceConfig,
    ObjectiveConfig,
    RolloutConfig,
    StatesConfig,
)

TeacherFill = Literal["terminal", "argmax"]
AdaptedModule = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
Fp8Recipe = Literal["off", "delayed", "tensorwise", "blockwise"]
Recompute = Literal["none", "selective", "full"]
LossReduction = Literal["sequence", "token"]
Verification = Literal["sizes", "hashes"]


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
    """A collective that takes longer than this ends the run with an error. A training step in which a rank gets nothing
    done for four fifths of it ends before, with a message that names the phase and the ranks."""


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
    deterministic: bool = False
    """The same run again gives the same bits: no kernel and no sum over ranks whose order is left open. On GPUs this
    costs speed, and an operation without such a kernel ends the run with an error. CPUs are so anyway."""
    max_skipped_steps: int = 10
    """An optimizer step whose loss or gradient is not finite is left out on all ranks, and its prompts go to
    `skipped_steps.jsonl` of the run directory. After so many in a row the run ends."""
    train_on_end_token: bool = False
    """Train the first end token of a response too, where the state masks it."""
    pad_to_multiple: int = 64
    """Rows of a micro-batch are padded to a multiple of this many tokens."""
    balance_rows: bool = True
    """Spread the rows of a global batch over the data-parallel ranks by their tokens; the loss stays the same."""
    seed: int = 1234
    """Of the data order, the rollouts and the states."""
    grace_seconds: float = 25.0
    """After SIGTERM a run finishes what it must (of a step still in its rollout nothing), saves a checkpoint and exits
    with code 143; what is not saved after this many seconds is given up. torchrun waits 30 seconds for its workers."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and when."""

    directory: str | None = None
    """Folder of the checkpoints; null for `checkpoints/` in the run directory. If it holds one, the run resumes."""
    save_interval: int = 50
    """Training steps between checkpoints; the last step is always saved. 0 saves at the end only."""
    async_save: bool = True
    """Write while training goes on, from a copy of the state in host memory; otherwise training waits for the files."""
    verify: Verification = "hashes"
    """What a run makes sure of before it goes on from a checkpoint; otherwise it takes the one before. `hashes`: each
    file is what was written, for which rank 0 reads all of them once. `sizes` leaves out the content of the shards, for
    checkpoints so large that reading them twice takes too long."""
    keep: int = 2
    """Newest checkpoints that are kept, besides the best one (`evaluation.interval`); 0 for all."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Decode the same tasks once for every pair of a threshold and a block size; without either there is no sweep.

    Always by `low_confidence_dynamic`, with as many denoising steps per block as a block has positions; all else is as
    `rollout` says. `evaluation.output` is the folder for table and plot. A sweep that was stopped goes on where it was.
    """

    thresholds: list[float] = field(default_factory=list)
    """Values of `rollout.dynamic_threshold`; none for the one that it has."""
    block_sizes: list[int] = field(default_factory=list)
    """Values of `rollout.block_size`; none for the one that it has. Others than the trained one are allowed too."""

    @property
    def is_wanted(self) -> bool:
        """Whether there is anything to sweep over."""
        return bool(self.thresholds or self.block_sizes)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Scoring responses to tasks with known answers."""

    files: list[str] = field(default_factory=list)
    """Task files: prompt rows with `source` (a reasoning-gym data set) and the `entry` its verifier needs."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness by name: its own, those of `megatron_opdlm/evaluation/tasks`, groups and tags of
    them, patterns such as `mmlu_*`."""
    include_path: list[str] = field(default_factory=list)
    """Folders with further task definitions of lm-evaluation-harness."""
    data_dir: str | None = None
    """Folder with the data sets of `megatron_opdlm/evaluation/tasks` as JSON files; null for those of the hub."""
    role: Literal["student", "teacher"] = "student"
    """Which model answers: the student, by the `rollout` settings, or the teacher, one token after the other."""
    max_tasks: int | None = None
    """Score the first this many tasks of each file, or documents of each of `tasks`; null for all."""
    num_responses: int = 1
    """Responses to each document of `tasks`, each with random numbers of its own."""
    temperature: float | None = None
    """Of the responses to `tasks`, instead of what a task asks for; null for that, and for 0 where it asks for none."""
    max_new_tokens: int | None = None
    """Longest response to a document of `tasks`, in tokens, instead of what the task asks for; null for that, and for
    `rollout.max_new_tokens` where it asks for none."""
    system_message: str | None = None
    """System message in front of every prompt of `tasks`."""
    num_chunks: int = 1
    """Jobs that share the documents of each of `tasks`, and write to the same `output`."""
    chunk: int = 0
    """Which of these jobs this is, from 0."""
    output: str | None = None
    """For `files`, a file for the scores and the responses, as JSON. For `tasks`, a folder that scores and responses go
    to, and from which an interrupted evaluation goes on; null for `evaluation/` in the run directory. With `sweep`, the
    folder of its table and plot."""
    interval: int = 0
    """Training steps between evaluations of the student on `files`, at temperature 0 and else as `rollout` says; the
    last step has one too. 0 for none. Each step that is more accurate than all before it is saved as well, and
    `best` beside the checkpoints names it, for `student.checkpoint` and for conversion."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """How decoding settings trade accuracy for speed."""
    sandbox: Literal["strict", "available"] = "available"
    """What the programs of responses run in. `strict`: nothing runs unless they get namespaces (processes, network and
    file system of their own) and a filter of system calls. `available`: the best that this machine or container
    allows, which is logged; nothing runs where it allows neither."""
    code_processes: int = 4
    """Programs of responses that run at one time on a rank."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """The run directory and what is written there."""

    directory: str = "runs/default"
    """Run directory: `config.yaml`, `metrics.jsonl`, `audit.jsonl` (the prompts of each step), `checkpoints/`,
    `tensorboard/`, `trajectories.jsonl`, `report.html`."""
    tensorboard: bool = True
    """Write TensorBoard event files too."""
    progress_bar: bool = True
    """Show a progress bar on rank 0."""
    trajectory_interval: int = 25
    """Training steps between those of which a few rollouts are kept in `trajectories.jsonl`, with what the teacher says
    about each token, for the report and `tools/show_trajectory.py`; the last step has some too. 0 for none. Each costs
    a forward of both models over `rollout.denoising_steps_per_block` rows. Objectives without rollouts keep none."""
    num_trajectories: int = 2
    """So many of each of these steps, the first ones that rank 0 trains on."""


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
