"""Megatron checkpoint -> Hugging Face folder, one tensor at a time.

    python tools/convert_megatron_to_hf.py --checkpoint runs/mine/checkpoints/step_00000480 --output my-model

Any layout can be read: a distributed checkpoint holds whole tensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint folder, or a run's checkpoints/")
    parser.add_argument("--output", required=True, type=Path, help="Hugging Face folder to write; must not exist")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights; default: the checkpoint's")
    arguments = parser.parse_args()

    from megatron_opdlm.config.errors import user_errors

    with user_errors():
        from megatron_opdlm.checkpointing.conversion import megatron_to_hf
        from megatron_opdlm.observability.logging import set_up_logging

        set_up_logging()

        megatron_to_hf(arguments.checkpoint, arguments.output, dtype=arguments.dtype)


if __name__ == "__main__":
    main()
