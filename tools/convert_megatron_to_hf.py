"""Megatron checkpoint -> Hugging Face folder, one tensor at a time.

    python tools/convert_megatron_to_hf.py --checkpoint runs/mine/checkpoints/step_00000480 --output my-model
    python tools/convert_megatron_to_hf.py --checkpoint runs/mine/checkpoints --output my-sdar --format sdar

Any layout can be read: a distributed checkpoint holds whole tensors. How the model decodes by default is taken from the
run's settings, or from the `--rollout.*` given here. megatron_opdlm/export/README.md says which server reads what.
"""

from __future__ import annotations

import argparse
import typing
from pathlib import Path

from megatron_opdlm.config.method import LogitShift, RemaskingStrategy


def main() -> None:
    arguments = vars(build_parser().parse_args())

    from megatron_opdlm.config.errors import user_errors

    with user_errors():
        from megatron_opdlm.export.hf_package import ExportOptions, export_hf
        from megatron_opdlm.observability.logging import set_up_logging

        set_up_logging()

        given = {name: value for name, value in arguments.items() if name.startswith("rollout.") and value is not None}
        options = {name: value for name, value in arguments.items() if not name.startswith("rollout.")}
        checkpoint, output = options.pop("checkpoint"), options.pop("output")
        rollout = {name.removeprefix("rollout."): value for name, value in given.items()}
        export_hf(checkpoint, output, ExportOptions(**options, rollout=rollout))


def build_parser() -> argparse.ArgumentParser:
    """The flags; those of `rollout` are spelt as in a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint folder, or a run's checkpoints/")
    parser.add_argument("--output", required=True, type=Path, help="Hugging Face folder to write; must not exist")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights; default: the checkpoint's")
    parser.add_argument(
        "--format",
        choices=("transformers", "sdar"),
        help="transformers: a Qwen, loaded by plain transformers; sdar: the same under the names that servers of block "
        "diffusion know; default: what the run started from",
    )
    parser.add_argument(
        "--with-generate", action="store_true", help="add model code with a generate (trust_remote_code); sdar has it"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of one file of weights, such as 500MB or 5GB")
    rollout = parser.add_argument_group("decoding", "settings to record instead of the run's")
    rollout.add_argument("--rollout.block_size", type=int, metavar="K")
    rollout.add_argument("--rollout.denoising_steps_per_block", type=int, metavar="S")
    rollout.add_argument("--rollout.remasking_strategy", choices=typing.get_args(RemaskingStrategy))
    rollout.add_argument("--rollout.dynamic_threshold", type=float, metavar="P")
    rollout.add_argument("--rollout.entropy_bound", type=float, metavar="NATS")
    rollout.add_argument("--rollout.logit_shift", choices=typing.get_args(LogitShift))
    rollout.add_argument("--rollout.stop_token_ids", type=int, nargs="+", metavar="ID")
    return parser


if __name__ == "__main__":
    main()
