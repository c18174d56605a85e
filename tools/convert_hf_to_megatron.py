"""Hugging Face folder -> Megatron checkpoint.

    python tools/convert_hf_to_megatron.py --hf Qwen3-0.6B --output student --role student --dtype bfloat16

The student's role adds the mask token: an id in the tokenizer, a row in the embedding, `mask_token_id` in the config.
One process suffices; under torchrun every rank holds a part of the weights (`--tensor-model-parallel-size`).
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, help="Hugging Face folder: Qwen3, Qwen2.5, SDAR")
    parser.add_argument("--output", required=True, type=Path, help="folder of the Megatron checkpoint; must not exist")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights; default: the folder's own")
    parser.add_argument("--role", choices=("student", "teacher"), default="student")
    parser.add_argument("--mask-token", default="<|MASK|>", help="text of the mask token that the student gets")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="ranks that share each weight")
    arguments = parser.parse_args()

    from megatron_opdlm.config.errors import user_errors

    with user_errors():
        from megatron_opdlm.checkpointing.conversion import hf_to_megatron
        from megatron_opdlm.observability.logging import set_up_logging

        set_up_logging()

        hf_to_megatron(
            arguments.hf,
            arguments.output,
            role=arguments.role,
            dtype=arguments.dtype,
            mask_token=arguments.mask_token,
            tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        )


if __name__ == "__main__":
    main()
