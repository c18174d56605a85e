"""Responses as they are kept on disk: one line each, as soon as it is there.

    store = ResponseStore(Path("evaluation/responses"), writer="chunk-0-rank-0")
    known = store.read(wanted)                      # {key: fingerprint} of the requests -> {key: Response}
    with store: store.append(response)

Every rank that decodes has a file of its own per task, `<task>/<writer>.jsonl`, so nobody waits for anybody, and an
evaluation that is killed keeps what it has: at most the last line of a file is torn, and a torn line is no response. A
response counts again only for the model, the prompt and the settings that it was decoded with: its fingerprint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TextIO

from megatron_opdlm.evaluation.requests import Key

THINKING_ENDS = "</think>"


@dataclass(frozen=True)
class Response:
    """What came of a request, and what it took."""

    task: str
    doc_id: int
    repeat: int
    fingerprint: str
    text: str
    """As decoded, thoughts included, without special tokens."""
    num_tokens: int
    """Up to and including the token that ended it."""
    num_steps: int
    """Denoising steps of its blocks, each of them a forward that it took part in."""
    stop_reason: str
    """`end_token`: the model ended it. `stop`: by a token of the request's `until`. `length`. `prompt_too_long`: the
    prompt has more than `data.max_prompt_tokens` tokens, nothing was decoded."""
    call: int
    """Which decoding it was part of: the time that began, in nanoseconds."""
    seconds: float
    """From then until it was there."""

    @property
    def key(self) -> Key:
        """Of its request."""
        return self.task, self.doc_id, self.repeat


def scored_text(text: str, until: Iterable[str], enable_thinking: bool) -> str:
    """The part of a response that counts: behind the thoughts, and before the first of the texts that end it."""
    if enable_thinking:
        text = text.rpartition(THINKING_ENDS)[2].lstrip()
    for ending in until:
        text = text.partition(ending)[0]
    return text


class ResponseStore:
    """The folder of an evaluation's responses. Each rank that writes needs a name of its own."""

    def __init__(self, folder: Path, writer: str) -> None:
        self.folder, self.writer = folder, writer
        self._files: dict[str, TextIO] = {}

    def read(self, wanted: Mapping[Key, str]) -> dict[Key, Response]:
        """The responses on disk that have the fingerprint that is wanted, whoever wrote them."""
        found = {}
        for task in sorted({key[0] for key in wanted}):
            for path in sorted(self._folder_of(task).glob("*.jsonl")):
                for response in _read_lines(path):
                    if wanted.get(response.key) == response.fingerprint:
                        found.setdefault(response.key, response)
        return found

    def append(self, response: Response) -> None:
        """Writes a response through to the system, which keeps it if this process is killed."""
        if response.task not in self._files:
            self._files[response.task] = self._open(response.task)
        file = self._files[response.task]
        file.write(json.dumps(asdict(response), ensure_ascii=False) + "\n")
        file.flush()

    def __enter__(self) -> ResponseStore:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def _open(self, task: str) -> TextIO:
        path = self._folder_of(task) / f"{self.writer}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        if file.tell() and not _ends_with_newline(path):
            file.write("\n")  # behind a torn line
        return file

    def _folder_of(self, task: str) -> Path:
        return self.folder / file_name(task)


def file_name(task: str) -> str:
    """A task's name as part of a path."""
    return re.sub(r"[^\w.-]", "_", task)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _read_lines(path: Path) -> Iterator[Response]:
    names = {field.name for field in fields(Response)}
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if isinstance(values, dict) and set(values) == names:
            yield Response(**values)
