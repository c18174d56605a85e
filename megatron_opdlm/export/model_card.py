"""The README.md of an exported folder: what the model is, how it came about, how well it does, how to use it.

    text = model_card(family, architecture, serving, run, with_code=True)

It names folders and files by their last part alone: where they were on a machine is nobody's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCardData

from megatron_opdlm.config.schema import Config
from megatron_opdlm.export.formats import SDAR_MASK_TOKEN_ID, Family, is_served_alike
from megatron_opdlm.export.run_record import RunRecord
from megatron_opdlm.export.serving import Serving
from megatron_opdlm.models.qwen3 import Qwen3Architecture

SGLANG_FILE = "sglang.yaml"


def model_card(
    family: Family, architecture: Qwen3Architecture, serving: Serving | None, run: RunRecord | None, with_code: bool
) -> str:
    """The text, with the front matter of the Hugging Face hub."""
    kind = "A block-diffusion language model" if serving else "A language model"
    parts = [
        f"---\n{_front_matter(serving, with_code)}\n---",
        "# " + (f"{_source(run.config)}, trained for {run.step} steps" if run else "Exported model"),
        f"{kind} with the tensors of a {family.model_type.replace('sdar', 'qwen3')}, {architecture.dtype}, exported by "
        "megatron_opdlm.",
    ]
    if serving is not None:
        parts += ["## Decoding", _decoding(serving)]
    if run is not None:
        parts += ["## Training", _table(_training(run))]
        if run.scores:
            parts += ["## Scores", _scores(run)]
    parts += ["## Use", _use(family, serving, with_code)]
    return "\n\n".join(parts) + "\n"


def _front_matter(serving: Serving | None, with_code: bool) -> str:
    tags = ["megatron_opdlm", *(["block-diffusion"] if serving else []), *(["custom_code"] if with_code else [])]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
    return data.to_yaml().strip()


def _source(config: Config) -> str:
    return _name(config.student.hf or config.student.checkpoint)


def _name(path: str | None) -> str:
    return "none" if path is None else Path(path).name


def _decoding(serving: Serving) -> str:
    rollout = serving.rollout
    rows = {
        "mask token id": serving.mask_token_id,
        "end token ids": ", ".join(map(str, serving.end_token_ids)),
        "block size": rollout.block_size,
        "denoising steps per block, at most": rollout.denoising_steps_per_block,
        "remasking strategy": f"`{rollout.remasking_strategy}`",
        "dynamic threshold": rollout.dynamic_threshold,
        "entropy bound": rollout.entropy_bound,
        "logit shift": f"`{rollout.logit_shift}`",
    }
    return f"{_table(rows)}\n\nFrom {serving.origin}. Blocks lie on the grid of absolute positions, prompt included."


def _training(run: RunRecord) -> dict[str, object]:
    config, metrics = run.config, run.metrics
    divergence = config.divergence.kind + (f", top {config.divergence.top_k}" if config.divergence.top_k else "")
    rows: dict[str, object] = {
        "student's origin": _source(config),
        "teacher": _name(config.teacher.hf or config.teacher.checkpoint) if config.objective.needs_teacher else "none",
        "objective": config.objective.name,
        "divergence": divergence if config.objective.needs_teacher else "none",
        "prompts": ", ".join(_name(file) for file in config.data.train_files),
        "training steps": run.step,
        "prompts per step, responses per optimizer step": f"{config.training.num_prompts_per_step}, "
        f"{config.training.global_batch_size}",
        "learning rate": f"{config.optimizer.lr:g} to {config.optimizer.min_lr:g}",
        "precision": config.precision.dtype,
        "adapters": f"rank {config.lora.rank}, merged" if config.lora.rank else "none",
    }
    if metrics:
        rows |= {
            "response tokens": f"{metrics['rollout/total_tokens']:,.0f}",
            "trained positions": f"{run.trained_tokens:,}",
            "FLOPs, paper's account": f"{metrics['perf/total_paper_flops']:.3g}",
            "FLOPs, all of them": f"{metrics['perf/total_true_flops']:.3g}",
        }
    return rows


def _scores(run: RunRecord) -> str:
    lines = ["| task | metric | score | decoding |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.task} | {row.metric} | {100 * row.value:.1f} % | {row.decoding} |" for row in run.scores]
    return "\n".join(lines)


def _table(rows: dict[str, object]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _use(family: Family, serving: Serving | None, with_code: bool) -> str:
    return "\n\n".join(_ways(family, serving, with_code))


def _ways(family: Family, serving: Serving | None, with_code: bool) -> Iterator[str]:
    model_class = family.architecture.replace("SDARMoe", "Qwen3Moe").replace("SDAR", "Qwen3")
    code = f"model = {model_class}.from_pretrained(FOLDER)"
    if family.model_type == "sdar_moe":  # by any other type, transformers 5 does not find the experts
        config = 'config = Qwen3MoeConfig.from_pretrained(FOLDER, model_type="qwen3_moe")\n'
        code = config + code.replace("FOLDER", "FOLDER, config=config")
    yield f"Weights, in plain transformers:\n\n{_code(code, 'python')}"
    if serving is None:
        return
    yield "Its own `generate` there decodes token by token, which this model was not trained for."
    if with_code:
        code = [
            "model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)",
            "ids = model.generate(**inputs, max_new_tokens=256)  # by blocks, with the settings above",
        ]
        yield f"Block diffusion in transformers, with the code in this folder:\n\n{_code(chr(10).join(code), 'python')}"
    if family.is_sdar:
        yield from _servers(serving)


def _servers(serving: Serving) -> Iterator[str]:
    rollout = serving.rollout
    if serving.mask_token_id == SDAR_MASK_TOKEN_ID:
        same = "which commits the same tokens" if is_served_alike(serving) else "which is not the strategy above"
        command = f"""python -m sglang.launch_server --model-path FOLDER --trust-remote-code \\
    --dllm-algorithm LowConfidence --dllm-algorithm-config FOLDER/{SGLANG_FILE}"""
        yield f"SGLang ({same}, at temperature 0):\n\n{_code(command, 'bash')}"
        if rollout.remasking_strategy != "entropy_bounded":
            command = f"""lmdeploy serve api_server FOLDER --backend pytorch --trust-remote-code \\
    --dllm-block-length {rollout.block_size} --dllm-denoising-steps {rollout.denoising_steps_per_block} \\
    --dllm-unmasking-strategy {rollout.remasking_strategy} --dllm-confidence-threshold {rollout.dynamic_threshold}"""
            yield f"LMDeploy:\n\n{_code(command, 'bash')}"
    else:
        yield (
            f"SGLang and LMDeploy cannot serve it: they take {SDAR_MASK_TOKEN_ID} for the mask token, and here it is "
            f"{serving.mask_token_id}."
        )
    code = f"""llm = LLM(FOLDER, mask_token_id={serving.mask_token_id}, block_length={rollout.block_size})
params = SamplingParams(
    block_length={rollout.block_size}, denoising_steps={rollout.denoising_steps_per_block},
    remasking_strategy="{rollout.remasking_strategy}", dynamic_threshold={rollout.dynamic_threshold},
    eb_threshold={rollout.entropy_bound}, stop_words={list(serving.end_token_ids)},
)"""
    yield f"JetEngine:\n\n{_code(code, 'python')}"


def _code(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
