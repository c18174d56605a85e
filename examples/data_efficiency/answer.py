"""The teacher's greedy responses to a file of tasks, as the `response` of each row.

    python examples/data_efficiency/answer.py --tasks tasks/train.jsonl --output tasks

writes `answered.jsonl`. Decoding is that of plain transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "quickstart"
BATCH_SIZE = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True, help="JSONL with a `question` per row")
    parser.add_argument("--output", type=Path, required=True, help="folder for answered.jsonl")
    parser.add_argument("--teacher", type=Path, default=QUICKSTART / "teacher", help="Hugging Face folder")
    arguments = parser.parse_args()

    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    from megatron_opdlm.data.tokenizer import load_tokenizer

    sys.path.insert(0, str(QUICKSTART))
    from make_teacher import respond

    tokenizer, model = load_tokenizer(arguments.teacher), AutoModelForCausalLM.from_pretrained(arguments.teacher).eval()
    rows = [json.loads(line) for line in arguments.tasks.read_text().splitlines()]
    answered = []
    for begin in tqdm(range(0, len(rows), BATCH_SIZE), desc="responses", unit_scale=BATCH_SIZE, unit=" rows"):
        some = rows[begin : begin + BATCH_SIZE]
        answered += [row | {"response": text} for row, text in zip(some, respond(model, tokenizer, some), strict=True)]
    lines = [json.dumps(row) + "\n" for row in answered]
    (arguments.output / "answered.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
