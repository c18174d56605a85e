"""Post-training quantisation of a student or a teacher by nvidia-modelopt: a folder for vLLM, SGLang, and a report.

    python tools/quantize.py --format fp8 --output student-fp8 --config recipe.yaml --student.hf student \\
        --data.train_files prompts.jsonl --evaluation.files heldout.jsonl --rollout.temperature 0
    python tools/quantize.py --format fp8 --output teacher-fp8 --teacher.hf Qwen3-8B --evaluation.role teacher \\
        --data.train_files prompts.jsonl

The model answers the first `--num-prompts` prompts of `data.train_files` with the settings of `rollout`, and is
calibrated with these responses in the states that it was in. With `evaluation.files` it is scored before and after. The
output also has the report, `quantization_report.json`. `megatron_opdlm/export/README.md` says what there is in the
folder and who reads it. All settings of `megatron_opdlm.evaluate` can be given; its `--help` lists them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_opdlm.config.schema import Config
    from megatron_opdlm.evaluation.task_files import StudentOnTaskFiles
    from megatron_opdlm.export.quantize_run import Subject


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--format", required=True, choices=("fp8", "int8", "nvfp4"), help="numbers of the linear layers"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--num-prompts", type=int, default=128, help="prompts to calibrate with")
    arguments, settings = parser.parse_known_args()

    from megatron_opdlm.config.errors import user_errors

    with user_errors():
        _quantize(arguments.format, arguments.output, arguments.num_prompts, _settings(settings))


def _settings(arguments: list[str]) -> Config:
    from megatron_opdlm.config.load import load_config
    from megatron_opdlm.config.schema import LoraConfig

    config = load_config(arguments, required=("evaluation.role", "data.train_files"))
    if config.evaluation.tasks:
        raise ValueError("evaluation.tasks must be left out: quantisation is scored on evaluation.files")
    if config.evaluation.files:
        config = load_config(arguments, required=("evaluation",))
    section = getattr(config, config.evaluation.role)
    # Megatron's own layers, wherever Transformer Engine is, on the device from beginning to end
    stays = {"transformer": {"transformer_impl": "local"} | section.transformer}
    stays |= {"offload": False} if config.evaluation.role == "teacher" else {}
    return dataclasses.replace(
        config,
        lora=LoraConfig(),  # the weights are whole
        # what stands in a graph would not call the quantizers
        rollout=dataclasses.replace(config.rollout, cuda_graphs=False),
        **{config.evaluation.role: dataclasses.replace(section, **stays)},
    )


def _quantize(quantization: str, output: Path, num_prompts: int, config: Config) -> None:
    # torch, Megatron and modelopt are imported only when there is something to quantize, so `--help` answers at once
    from megatron_opdlm.config.check import check_layout
    from megatron_opdlm.observability.logging import set_up_logging
    from megatron_opdlm.parallel.initialize import rank, shut_down, world_size

    if output.exists() or not output.absolute().parent.is_dir():
        raise ValueError(f"--output ({output}) must not exist, in a folder that does")
    if num_prompts < 1:
        raise ValueError(f"--num-prompts ({num_prompts}) must be at least 1")
    check_layout(config.parallel, world_size())
    from megatron_opdlm.export.quantize import check_quantization, require_modelopt

    require_modelopt()
    check_quantization(quantization, config)
    set_up_logging()
    from megatron_opdlm.evaluation.task_files import StudentOnTaskFiles
    from megatron_opdlm.export.quantize_run import quantize_to_folder, report_table

    evaluated = StudentOnTaskFiles(config)
    score = functools.partial(evaluated.score, evaluated.opened.rollout)
    prompts = _prompts(config, evaluated, num_prompts)
    report = quantize_to_folder(output, quantization, _subject(evaluated), prompts, config, score)
    if rank() == 0:
        print(report_table(report))
    shut_down()


def _prompts(config: Config, evaluated: StudentOnTaskFiles, num_prompts: int) -> list:
    from megatron_opdlm.data.prompts import read_prompts

    prompt_set = read_prompts(
        config.data.train_files,
        evaluated.opened.tokenizer,
        max_prompt_tokens=config.data.max_prompt_tokens,
        apply_chat_template=config.data.apply_chat_template,
        enable_thinking=config.data.enable_thinking,
    )
    return prompt_set.prompts[:num_prompts]


def _subject(evaluated: StudentOnTaskFiles) -> Subject:
    from megatron_opdlm.checkpointing.hf_folder import copy_assets
    from megatron_opdlm.export.quantize_run import Subject

    opened, model = evaluated.opened, evaluated.model
    is_student = opened.config.evaluation.role == "student"
    return Subject(
        model.model,
        model.engine(),
        opened.special,
        opened.source.architecture,
        is_student,
        opened.folder,
        opened.source.write_assets if is_student else functools.partial(copy_assets, opened.pretrained.assets),
    )


if __name__ == "__main__":
    main()
