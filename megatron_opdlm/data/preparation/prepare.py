"""From the sources of a mix to shards of prompts, in a way that can be stopped anywhere and gone on with.

Stage one examines each source part by part (`checks`) and writes a table per part to `OUTPUT/parts`. Stage two puts all
tables together: it drops what came before, draws where a source has `max_rows`, shuffles by the seed and writes
`prompts-00000-of-00007.parquet` and so on, then the statistics. Every file is written beside its name and renamed when
it is whole, and depends on sources and settings alone; so the same command after a `kill -9` finds what is there, makes
the rest, and ends in the same bytes. `preparation.json` holds the settings, for which an output folder is good.

    prepare(read_mix("opdlm"), checks, Settings(seed=1234, ...), Path("prompts"))
    # then: --data.train_files with the names of the shards
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from megatron_opdlm.data.preparation.checks import SCHEMA, RowChecks
from megatron_opdlm.data.preparation.mixes import Source
from megatron_opdlm.data.preparation.source_rows import SourceRows, open_source
from megatron_opdlm.data.preparation.statistics import count, markdown

MESSAGES = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()}))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the files depend on besides sources and checks."""

    seed: int
    """Of the order of the rows, and of what is drawn where a source has `max_rows`."""
    rows_per_shard: int = 10_000
    """Rows of a shard, the last one aside."""
    rows_per_part: int = 10_000
    """Rows that are examined at a time; the files do not depend on it."""


def prepare(
    sources: Sequence[Source], checks: RowChecks, settings: Settings, identity: dict[str, Any], output: Path
) -> dict[str, Any]:
    """Writes shards, `statistics.json` and `statistics.md` to `output`; returns the statistics.

    `identity` is what the checks depend on, as JSON; an output folder of another one is refused.

    Raises:
        ValueError: a source cannot be read; `output` is of other settings or holds something else; no row is left.
    """
    opened = [open_source(source) for source in sources]
    asked = identity | {
        "sources": [_identity(rows) for rows in opened],
        "seed": settings.seed,
        "rows_per_shard": settings.rows_per_shard,
    }
    _claim(output, asked)
    finished = output / "statistics.json"
    if not finished.is_file():
        parts = output / f"parts-of-{settings.rows_per_part}"
        tables = [
            _examine_source(rows, checks, parts / str(number), settings.rows_per_part)
            for number, rows in enumerate(opened)
        ]
        lines = _decide(sources, tables, settings.seed)
        statistics = count(lines)
        if not statistics["all"]["kept"]:
            raise ValueError(f"of {len(lines)} rows none is left: {statistics['all']['dropped']}")
        _write_shards([line for line in lines if not line["reason"]], settings, output)
        _write_text(output / "statistics.md", markdown(statistics))
        _write_text(finished, json.dumps(statistics, indent=1))
    for parts in output.glob("parts-of-*"):
        shutil.rmtree(parts)
    return json.loads(finished.read_text(encoding="utf-8"))


def _identity(rows: SourceRows) -> dict[str, Any]:
    """What the rows depend on: their content and how it is read, wherever the files are."""
    return dataclasses.asdict(rows.source) | {"path": Path(rows.source.path).name, "content": rows.fingerprint}


def _claim(output: Path, asked: dict[str, Any]) -> None:
    """Makes the folder this preparation's, or finds that it is."""
    file = output / "preparation.json"
    if file.is_file():
        there = json.loads(file.read_text(encoding="utf-8"))
        different = sorted(name for name in asked.keys() | there.keys() if asked.get(name) != there.get(name))
        if different:
            raise ValueError(f"--output ({output}) holds a preparation with another {', '.join(different)}")
        return
    if output.is_dir() and any(path.suffix != ".partial" for path in output.iterdir()):
        raise ValueError(f"--output ({output}) must be empty, or hold an earlier preparation")
    output.mkdir(parents=True, exist_ok=True)
    _write_text(file, json.dumps(asked, indent=1))


def _examine_source(rows: SourceRows, checks: RowChecks, folder: Path, rows_per_part: int) -> pyarrow.Table:
    """Stage one for a source: the tables of its parts, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = []
    with tqdm(total=rows.num_rows, desc=rows.source.name, unit="row", disable=None) as bar:
        for start in range(0, rows.num_rows, rows_per_part):
            file = folder / f"{start:09d}.parquet"
            if not file.is_file():
                write_table(checks.examine(rows.read(start, start + rows_per_part)), file)
            tables.append(pyarrow.parquet.read_table(file))
            bar.update(len(tables[-1]))
    return pyarrow.concat_tables([SCHEMA.empty_table(), *tables])


def _decide(sources: Sequence[Source], tables: Sequence[pyarrow.Table], seed: int) -> list[dict[str, Any]]:
    """Stage two: all rows in their order with the reason why they are dropped, with `mix_source` for the statistics."""
    seen: set[bytes] = set()
    lines: list[dict[str, Any]] = []
    for source, table in zip(sources, tables, strict=True):
        own = [line | {"mix_source": source.name} for line in table.to_pylist()]
        for line in own:
            if not line["reason"] and line["key"] in seen:
                line["reason"] = "duplicate"
            elif not line["reason"]:
                seen.add(line["key"])
        kept = [line for line in own if not line["reason"]]
        if source.max_rows is not None and len(kept) > source.max_rows:
            chosen = set(random.Random(f"{seed}:{source.name}").sample(range(len(kept)), source.max_rows))
            for number, line in enumerate(kept):
                line["reason"] = "" if number in chosen else "over_max_rows"
        lines += own
    return lines


def _write_shards(kept: list[dict[str, Any]], settings: Settings, output: Path) -> None:
    random.Random(settings.seed).shuffle(kept)
    questions = [json.loads(line["question"]) for line in kept]
    if any(isinstance(question, list) for question in questions):  # a column has one type
        questions = [_messages(question) for question in questions]
    columns = {name: [line[name] for line in kept] for name in ("ground_truth_answer", "domain", "source")}
    kind = MESSAGES if isinstance(questions[0], list) else pyarrow.string()
    table = pyarrow.table(
        {"question": pyarrow.array(questions, kind)}
        | {name: pyarrow.array(values, pyarrow.string()) for name, values in columns.items()}
    )
    for name, start in shard_names(len(kept), settings.rows_per_shard):
        file = output / name
        if not file.is_file():
            write_table(table.slice(start, settings.rows_per_shard), file)


def shard_names(num_rows: int, rows_per_shard: int) -> Iterator[tuple[str, int]]:
    """(file name, first row) of each shard."""
    num_shards = -(-num_rows // rows_per_shard)
    for number in range(num_shards):
        yield f"prompts-{number:05d}-of-{num_shards:05d}.parquet", number * rows_per_shard


def _messages(question: Any) -> list[dict[str, str]]:
    return question if isinstance(question, list) else [{"role": "user", "content": question}]


def write_table(table: pyarrow.Table, file: Path) -> None:
    """Writes a Parquet file that appears whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    pyarrow.parquet.write_table(table, partial)
    partial.replace(file)


def _write_text(file: Path, text: str) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
