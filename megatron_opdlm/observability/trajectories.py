"""A few sequences of a run, kept with what the viewer shows of them: when each token was committed, how sure the
student was, and what the teacher says.

    writer = TrajectoryWriter(run / "trajectories.jsonl", step=0)          # on rank 0
    writer.write([KeptTrajectory(...)])
    kept = read_trajectories(run / "trajectories.jsonl")
    kept[0].commit_order                                                     # [2, 1, 3, 4, ...]

A line of the file is a sequence. Text is made from single tokens, for people to read; nothing is ever made of it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_opdlm.observability.writers import keep_records_before, read_records

logger = logging.getLogger(__name__)

FILE = "trajectories.jsonl"
"""Its name in the run directory."""
Figures = list[float | None]
"""One for each response token; None where it does not count, or is no number."""


@dataclass(frozen=True, kw_only=True)
class KeptTrajectory:
    """A sequence as the viewer needs it; R response tokens, those behind the end token of the last block included."""

    step: int
    """Training step whose rollout it is of, from 0."""
    prompt_id: int
    """Row of the prompt in the data set."""
    sample_index: int
    """Which response to that prompt."""
    domain: str
    """Of the prompt; "" if its row names none."""
    stop_reason: str
    """As `diffusion.trajectory.Trajectory` has it."""
    block_size: int
    """K of the grid, whose block 0 begins with the prompt."""
    response_length: int
    """Response tokens that count."""
    prompt_ids: list[int]
    """Token ids of the prompt."""
    token_ids: list[int]
    """[R] token ids of the response."""
    step_map: list[int]
    """[R] the denoising step within its block that committed the token, from 1."""
    log_probs: Figures
    """[R] the student's log-probability of the token when it was committed: its confidence."""
    divergence: Figures
    """[R] of the student from the teacher, in nats, in the state in which the token was committed."""
    teacher_log_probs: Figures
    """[R] the teacher's log-probability of the token."""
    alternatives: list[list[tuple[int, float]]]
    """[R] the teacher's most likely tokens and their log-probabilities, the likeliest first."""
    texts: dict[str, str]
    """Token id, as JSON writes keys, -> its text, for all ids in here."""

    @property
    def commit_order(self) -> list[int]:
        """[R] the denoising step of the whole sequence, from 1, that committed the token.

        Blocks are denoised one after another. A block takes as many steps as its tokens name different ones.

        Example: a prompt of 2 tokens, blocks of 4, step map [1, 1, 2, 1, 2, 3] -> [1, 1, 3, 2, 3, 4].
        """
        order: list[int] = []
        steps_before = 0
        for begin, end in self._blocks():
            realised = sorted(set(self.step_map[begin:end]))
            order += [steps_before + realised.index(step) + 1 for step in self.step_map[begin:end]]
            steps_before += len(realised)
        return order

    def _blocks(self) -> list[tuple[int, int]]:
        """Where in the response each block begins and ends; the first one holds the end of the prompt too."""
        first = self.block_size - len(self.prompt_ids) % self.block_size
        begins = [0, *range(first, len(self.token_ids), self.block_size)]
        return list(zip(begins, [*begins[1:], len(self.token_ids)], strict=True))

    def to_json(self) -> str:
        """One line of JSON; `from_record` makes the same of what it parses to."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_record(cls, record: dict) -> KeptTrajectory:
        """Of a parsed line. ValueError if a field is missing or unknown."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(record) != names:
            raise ValueError(f"a kept trajectory has exactly the fields {', '.join(sorted(names))}; this one differs")
        alternatives = [[(token_id, value) for token_id, value in some] for some in record["alternatives"]]
        return cls(**(record | {"alternatives": alternatives}))


class TrajectoryWriter:
    """Adds sequences to the file of a run that begins, or goes on, at training step `step`.

    What an interrupted run kept of that step and later ones goes. A line that cannot be written is a warning.
    """

    def __init__(self, path: str | os.PathLike, step: int) -> None:
        self._path = Path(path)
        keep_records_before(self._path, step)

    def write(self, trajectories: Iterable[KeptTrajectory]) -> None:
        """Appends a line for each. On disk, short of a loss of power, on return."""
        lines = "".join(trajectory.to_json() + "\n" for trajectory in trajectories)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            logger.warning("%s lacks a sequence or more: %s", self._path, error)


def read_trajectories(path: str | os.PathLike) -> list[KeptTrajectory]:
    """The sequences of a file, in its order; none if there is no file. A line that is not whole is left out.

    ValueError names the file if a line is of something else.
    """
    if not Path(path).is_file():
        return []
    try:
        return [KeptTrajectory.from_record(record) for record in read_records(path)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
