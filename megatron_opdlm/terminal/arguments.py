"""The command line of `generate`: which model, what it is asked, how it decodes, how the answers are shown.

    arguments = parse_arguments(["--hf", "student", "--prompt", "1+1=", "--rollout.temperature", "0"])
    arguments.config.rollout.block_size         # what the folder says, unless a flag says otherwise
    arguments.is_chat                           # False: there is a prompt

Its own flags stand in `build_own_parser`. The others are those settings of the schema that decoding heeds (`OFFERED`);
their defaults are what the model's folder says about itself (`terminal.model_defaults`), else the schema's.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_opdlm.config.check import check_config
from megatron_opdlm.config.load import parse_config
from megatron_opdlm.config.rules import require
from megatron_opdlm.config.schema import Config
from megatron_opdlm.config.settings import SETTINGS, setting_that_holds
from megatron_opdlm.terminal.model_defaults import checkpoint_folder, settings_of_checkpoint, settings_of_hf

DESCRIPTION = """Answer prompts, or chat, with a block-diffusion student, and see it denoise.

    python -m megatron_opdlm.generate --hf student --prompt "1 + 1 ="
    python -m megatron_opdlm.generate --checkpoint runs/mine --prompts questions.jsonl --json
    python -m megatron_opdlm.generate --hf student                                            (a chat)

Block size, mask token, decoding settings and number format are those of the checkpoint or folder, as far as it says."""
OFFERED = (
    *(name for name in SETTINGS if name.startswith(("rollout.", "parallel."))),
    "precision.dtype",
    "data.enable_thinking",
    "student.mask_token",
    "student.transformer",
    "training.seed",
)
"""The settings that decoding heeds; no other one is taken."""


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    config: Config
    """Its `student` names the model."""
    prompt: str | None
    prompts: str | None
    """A file, or `-`."""
    json: bool
    output: Path | None
    show_steps: bool

    @property
    def is_chat(self) -> bool:
        """Whether the questions come one after the other, from a person."""
        return self.prompt is None and self.prompts is None


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Reads and checks everything that can be checked before the model is there.

    `--help` prints and exits with 0. ValueError names the flag or setting, its value and the rule.
    """
    own, flags = build_own_parser().parse_known_args(list(arguments))
    _check_own(own)
    _check_names(flags)
    defaults = settings_of_hf(own.hf) if own.checkpoint is None else settings_of_checkpoint(own.checkpoint)
    config = _for_decoding(parse_config(flags, defaults=defaults), own)
    check_config(config, None)
    if own.prompt is None and own.prompts is None:
        number = config.rollout.num_responses_per_prompt
        require(number == 1, f"rollout.num_responses_per_prompt ({number}) must be 1 in a chat")
    return Arguments(config, own.prompt, own.prompts, own.json, own.output, own.show_steps)


class _Parser(argparse.ArgumentParser):
    """Raises ValueError instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def build_own_parser() -> argparse.ArgumentParser:
    """Knows the flags of this command; the offered settings are in its help text only."""
    parser = _Parser(
        prog="python -m megatron_opdlm.generate",
        description=DESCRIPTION,
        usage="%(prog)s (--checkpoint DIR | --hf DIR) [--prompt TEXT | --prompts FILE] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_settings_help(),
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", metavar="DIR", help="Megatron checkpoint, a run's checkpoints/, or a run")
    model.add_argument("--hf", metavar="DIR", help="Hugging Face folder of a student")
    asked = parser.add_argument_group("prompts", "Without any, a chat: /reset, /steps, /quit; ctrl-C stops an answer.")
    asked.add_argument("--prompt", metavar="TEXT", help="a prompt")
    asked.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON, JSONL or Parquet rows with a question, text or chat messages; .txt, a prompt a line; - for lines "
        "from standard input",
    )
    asked.add_argument("--raw", action="store_true", help="leave out the chat template: go on from the prompt itself")
    shown = parser.add_argument_group("answers")
    shown.add_argument(
        "--json",
        action="store_true",
        help="an object a line: prompt_ids, token_ids, step_map, text, stop_reason, num_steps, tokens_per_step",
    )
    shown.add_argument("--output", metavar="FILE", type=Path, help="write these objects to a file as well")
    shown.add_argument("--show-steps", action="store_true", help="a line for each denoising step: the block after it")
    return parser


def _settings_help() -> str:
    lines = ["settings, with the defaults for a folder that says nothing of itself:"]
    for name in OFFERED:
        lines.append(f"  --{name} ({SETTINGS[name].default})\n      {SETTINGS[name].documentation}")
    return "\n".join(lines).replace("%", "%%")


def _check_own(own: argparse.Namespace) -> None:
    require(own.hf is not None or own.checkpoint is not None, "give --checkpoint or --hf, the model that answers")
    require(
        own.hf is None or own.checkpoint is None,
        f"--checkpoint ({own.checkpoint}) and --hf ({own.hf}) exclude each other: give one",
    )
    require(
        own.prompt is None or own.prompts is None,
        f"--prompt and --prompts ({own.prompts}) exclude each other: give one",
    )
    require(own.prompt is None or own.prompt.strip(), "--prompt () must not be empty")
    require(not (own.json and own.show_steps), "--show-steps and --json exclude each other: step_map says it already")
    if own.output is not None:
        require(own.output.parent.is_dir(), f"--output ({own.output}) must lie in a folder that exists")
        require(not own.output.is_dir(), f"--output ({own.output}) must be a file, and is a folder")


def _check_names(flags: list[str]) -> None:
    """ValueError for the first flag that is none, or a setting that decoding has no use for."""
    own = [flag for action in build_own_parser()._actions for flag in action.option_strings]
    for flag in (argument.partition("=")[0] for argument in flags if argument.startswith("--")):
        holder = setting_that_holds(flag.removeprefix("--"))
        if holder is not None and holder.name in OFFERED:
            continue
        require(holder is None, f"{flag} is a setting that decoding has no use for")
        nearest = difflib.get_close_matches(flag, [*own, *(f"--{name}" for name in OFFERED)], n=1, cutoff=0.0)
        raise ValueError(f"{flag} is no flag; the nearest is {nearest[0]}")


def _for_decoding(config: Config, own: argparse.Namespace) -> Config:
    """With the model, and without what only training rows must fulfil."""
    folder = None if own.checkpoint is None else str(checkpoint_folder(own.checkpoint))
    sizes = (
        config.rollout.block_size,
        config.parallel.tensor_model_parallel_size,
        config.parallel.context_parallel_size,
    )
    return dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, hf=own.hf, checkpoint=folder),
        data=dataclasses.replace(config.data, apply_chat_template=config.data.apply_chat_template and not own.raw),
        # decoding pads no rows
        training=dataclasses.replace(config.training, pad_to_multiple=max(1, math.prod(sizes))),
    )
