"""The audit file of a run: which prompts each training step has learned from, so that nobody has to take it on trust.

    audit = AuditWriter(run / "audit.jsonl", step=20)       # {"resumed_at": 20}
    audit.record(20, [7, 3, 12, 5])                          # {"step": 20, "prompt_ids": [7, 3, 12, 5]}
    read_audit(run / "audit.jsonl")                          # {0: [...], ..., 20: [7, 3, 12, 5]}
    epochs({0: [2, 0], 1: [1, 1], 2: [0, 2]}, num_prompts=3)   # [[2, 0, 1], [1, 0, 2]]

Lines are only ever added. What a stopped run did after its last checkpoint it does once more, and the weights know of
the second time alone; so a line that says where a run went on takes back the steps from there on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)


class AuditWriter:
    """Adds to the audit of a run that begins, or goes on, at training step `step`. A line that fails is a warning."""

    def __init__(self, path: Path, step: int) -> None:
        is_torn = path.exists() and path.read_bytes()[-1:] not in (b"\n", b"")
        self._file = path.open("a", encoding="utf-8")
        self._add({"resumed_at": step}, before="\n" if is_torn else "")

    def record(self, step: int, prompt_ids: Sequence[int]) -> None:
        """Step `step` has learned from responses to these prompts. On disk on return: a checkpoint may follow."""
        self._add({"step": step, "prompt_ids": list(prompt_ids)})

    def close(self) -> None:
        """Closes the file."""
        try:
            self._file.close()
        except OSError as error:  # what could not be written before is tried once more
            logger.warning("%s lacks its last lines: %s", self._file.name, error)

    def _add(self, entry: dict, before: str = "") -> None:
        try:
            self._file.write(f"{before}{json.dumps(entry)}\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("%s lacks %s: %s", self._file.name, entry, error)


def read_audit(path: Path) -> dict[int, list[int]]:
    """Training step -> its prompt ids, for the steps that the weights know of. A line cut off by a kill is left out."""
    steps: dict[int, list[int]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "resumed_at" in entry:
            steps = {step: ids for step, ids in steps.items() if step < entry["resumed_at"]}
        else:
            assert entry["step"] not in steps, f"{path}: step {entry['step']} was taken twice"
            steps[entry["step"]] = entry["prompt_ids"]
    return steps


def epochs(steps: Mapping[int, Iterable[int]], num_prompts: int) -> list[list[int]]:
    """The prompt ids in the order of use, cut into epochs, of which the last may be incomplete.

    ValueError if a step is missing, or if a prompt comes twice in an epoch.
    """
    if sorted(steps) != list(range(len(steps))):
        raise ValueError(f"the audit has the steps {sorted(steps)}: not all from the first to the last")
    order = [prompt for step in range(len(steps)) for prompt in steps[step]]
    cut = [order[begin : begin + num_prompts] for begin in range(0, len(order), num_prompts)]
    for number, prompts in enumerate(cut):
        twice = {prompt for prompt in prompts if prompts.count(prompt) > 1}
        if twice:
            raise ValueError(f"epoch {number} has the prompts {sorted(twice)} more than once")
    return cut
