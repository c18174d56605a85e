"""What a recipe will need and take on some GPUs, before it runs there: memory, operations, messages, seconds, layouts.

    python tools/plan.py --config examples/qwen3_8b/recipe.yaml --model qwen3-8b --num-gpus 8 --gpu h100-80gb
    python tools/plan.py --config recipe.yaml --num-gpus 64 --gpu h100-80gb --search --parallel.context_parallel_size 2

prints the plan of the recipe's own layout; with `--search` also the fastest layouts that fit, and why others do not.
Shapes come from the `config.json` of `student.hf` and `teacher.hf` or, with `--model` and `--teacher-model`, from the
published ones. Further arguments are settings, as everywhere. Times are predictions:
`megatron_opdlm/planning/README.md` says from what.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_opdlm.config.architecture import Qwen3Architecture, read_architecture
from megatron_opdlm.config.errors import user_errors
from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import Config
from megatron_opdlm.observability.hardware import GPUS
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.memory import Models
from megatron_opdlm.planning.prediction import Prediction, predict
from megatron_opdlm.planning.published import PUBLISHED, published
from megatron_opdlm.planning.rates import Rates
from megatron_opdlm.planning.search import Search, check_choice, search
from megatron_opdlm.planning.table import as_mapping, render, render_search
from megatron_opdlm.planning.workload import Workload


def main(arguments: list[str] | None = None) -> None:
    """Plans and prints. A user's mistake ends in one line and exit code 2."""
    parser = _build_parser()
    options, settings = parser.parse_known_args(arguments)
    with user_errors():
        _check_counts(options)
        config = load_config([*(f"--config={recipe}" for recipe in options.config), *settings])
        models = models_of(config, options.model, options.teacher_model)
        gpu, rates = GPUS[options.gpu], Rates()
        workload = Workload.of(
            config,
            prompt_tokens=options.prompt_tokens,
            response_tokens=options.response_tokens,
            tokens_per_step=options.tokens_per_step,
        )
        found = None
        if options.search:
            found = search(models, config, num_gpus=options.num_gpus, gpu=gpu, workload=workload, rates=rates)
        try:
            check_choice(models, config, options.num_gpus)
        except ValueError as error:
            if found is None:
                raise
            own, refusal = None, str(error)  # a recipe without a layout for these GPUs is what a search is for
        else:
            layout = Layout.of(config.parallel, options.num_gpus, gpu.per_node)
            own, refusal = predict(models, config, layout, gpu, workload, rates), ""
    if options.json:
        print(json.dumps(_mapping(config, own, found, workload, options.show)))
        return
    print(render(config, own, options.gpu, workload) if own else f"the recipe's own layout: {refusal}")
    if found is not None:
        print("\n" + render_search(found, options.show))


def _mapping(
    config: Config, own: Prediction | None, found: Search | None, workload: Workload, num_shown: int
) -> dict[str, Any]:
    mapping = {} if own is None else as_mapping(config, own, workload)
    if found is not None:
        best = found.fitting[:num_shown]
        mapping["search"] = [as_mapping(one.config, one.prediction, workload) for one in best]
        mapping["misfits"] = [f"{one.layout.spelt()}: {one.reason}" for one in found.misfits[:num_shown]]
    return mapping


def models_of(config: Config, model: str | None, teacher_model: str | None) -> Models:
    """Both shapes: published ones by name, or those of the recipe's folders. ValueError if there is neither."""
    student = _shape("student", model, config.student.hf)
    teacher = None
    if config.objective.needs_teacher:
        teacher = student if model and not teacher_model else _shape("teacher", teacher_model, config.teacher.hf)
    if config.lora.rank:
        raise ValueError(f"lora.rank ({config.lora.rank}) must be 0: plans are of training all weights")
    layers = config.student.transformer.get("transformer_impl", "transformer_engine")
    return Models(student, teacher, layers)


def _shape(role: str, name: str | None, folder: str | None) -> Qwen3Architecture:
    if name is not None:
        return published(name, "--model" if role == "student" else "--teacher-model")
    if folder is None:
        raise ValueError(f"give {role}.hf, or a published shape: --model {'|'.join(PUBLISHED)}")
    if Path(folder).is_dir():
        return read_architecture(Path(folder))
    return published(folder, f"{role}.hf")


def _check_counts(options: argparse.Namespace) -> None:
    for name in ("num_gpus", "show"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be 1 or more")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="append", default=[], metavar="RECIPE", help="YAML recipe, may be repeated")
    parser.add_argument("--num-gpus", type=int, required=True, help="ranks, one on each GPU")
    parser.add_argument("--gpu", choices=GPUS, default="h100-80gb", help="default: h100-80gb")
    parser.add_argument("--model", help=f"published shape of the student: {', '.join(PUBLISHED)}")
    parser.add_argument("--teacher-model", help="the same of the teacher; default: the student's")
    parser.add_argument("--prompt-tokens", type=int, help="mean length of a prompt; default: 200, if allowed")
    parser.add_argument("--response-tokens", type=float, help="mean of a response; default: 0.267 of its limit")
    parser.add_argument(
        "--tokens-per-step", type=float, default=1.5, help="that a denoising step commits; default: 1.5"
    )
    parser.add_argument("--search", action="store_true", help="try every layout, recompute and micro-batch size")
    parser.add_argument("--show", type=int, default=5, help="layouts to print of each kind; default: 5")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    main()
