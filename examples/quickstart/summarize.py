"""The last step of the quickstart: score the teacher, look at the exported student, write summary.json and report.html.

    python examples/quickstart/summarize.py --run runs/quickstart --teacher examples/quickstart/teacher \\
        --start examples/quickstart/teacher --seconds 700

The teacher is scored with plain transformers, greedily, token by token: an implementation independent of this project.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run directory of the quickstart")
    parser.add_argument("--teacher", required=True, type=Path, help="Hugging Face folder of the teacher")
    parser.add_argument("--start", required=True, type=Path, help="Hugging Face folder that the student started from")
    parser.add_argument("--seconds", required=True, type=int, help="wall-clock seconds of the steps before this one")
    arguments = parser.parse_args()

    from megatron_opdlm.observability.report import write_report
    from megatron_opdlm.observability.writers import read_records

    check_exported_student(arguments.run / "student_hf", arguments.start)
    untrained, static, dynamic = (
        read_scores(arguments.run / f"{name}.json") for name in ("untrained", "student_static", "student_dynamic")
    )
    records = read_records(arguments.run / "metrics.jsonl")
    summary = {
        "num_heldout_tasks": static["num_tasks"],
        "teacher_accuracy": teacher_accuracy(arguments.teacher, arguments.run / "tasks" / "heldout.jsonl"),
        "untrained_accuracy": untrained["accuracy"],
        "student_accuracy_static": static["accuracy"],
        "student_accuracy_dynamic": dynamic["accuracy"],
        "tokens_per_step_dynamic": dynamic["tokens_per_step"],
        "trained_tokens": sum(record["train/trained_tokens"] for record in records),
        "rollout_tokens": records[-1]["rollout/total_tokens"],
        "wall_seconds": arguments.seconds,
    }
    (arguments.run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_report(arguments.run, summary)
    print(json.dumps(summary, indent=2))
    print(f"report: {arguments.run / 'report.html'}")


def read_scores(path: Path) -> dict:
    """The scores of the only task file in an evaluation's output."""
    (result,) = json.loads(path.read_text()).values()
    return result["scores"]


def teacher_accuracy(folder: Path, task_file: Path, batch_size: int = 64) -> float:
    """Share of the tasks that the teacher solves with greedy decoding in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_opdlm.data.tokenizer import load_tokenizer
    from megatron_opdlm.evaluation.verifiable_tasks import read_tasks, score_response

    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tasks = read_tasks(task_file)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": task["question"]}], tokenize=False, add_generation_prompt=True
        )
        for task in tasks
    ]
    correct = 0
    for begin in range(0, len(tasks), batch_size):
        batch = tokenizer(texts[begin : begin + batch_size], return_tensors="pt", padding=True)
        with torch.no_grad():
            written = model.generate(**batch, max_new_tokens=28, do_sample=False)[:, batch["input_ids"].shape[1] :]
        responses = tokenizer.batch_decode(written, skip_special_tokens=True)
        correct += sum(
            score_response(task, response) == 1.0
            for task, response in zip(tasks[begin : begin + batch_size], responses, strict=True)
        )
    return correct / len(tasks)


def check_exported_student(folder: Path, started_from: Path) -> None:
    """Loads the exported folder with plain transformers; AssertionError if it is not a sound, trained Qwen3."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    student, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert tokenizer.mask_token_id == student.config.mask_token_id < student.config.vocab_size, "no row for the mask"
    start = AutoModelForCausalLM.from_pretrained(started_from)
    assert type(student) is type(start), f"{type(student).__name__} is not the class it started as"
    with torch.no_grad():
        logits = student(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all(), "the exported student's logits are not finite"
    moved = (student.model.norm.weight - start.model.norm.weight).abs().max()
    assert moved > 0, "the exported student still has its first weights"


if __name__ == "__main__":
    main()
