"""Which data sets a file of prompts is made of.

A mix is a name of `MIXES` or a YAML file with the same fields; paths in it are relative to it:

    sources:
      - {name: own, path: questions.jsonl, domain: math}
      - {name: dapo, path: BytedTsinghua-SIA/DAPO-Math-17k, domain: math, max_rows: 5000,
         fields: {question: prompt, ground_truth_answer: reward_model.ground_truth}}

`opdlm` is the paper's general mix, `math` that of its MATH models, `codeforces` the training problems of the data set
whose test problems are a benchmark.
Sources: https://github.com/divelab/OPDLM (README, data/readme.md), https://huggingface.co/datasets/open-r1/codeforces.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opdlm.data.preparation.templates import TEMPLATES
from megatron_opdlm.data.prompts import READERS

ROW_FIELDS = ("question", "ground_truth_answer", "domain", "source")
"""Fields of the rows that are written; `fields` of a source says what they are called there."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of a mix. Example: `Source(name="own", path="questions.jsonl", domain="math")`."""

    name: str
    """In statistics, and as the rows' `source` where they name none."""
    path: str
    """JSON, JSONL or Parquet file; otherwise a data set of the hub, or a folder that `datasets` can load."""
    config: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split of the data set."""
    data_file: str | None = None
    """The one file of the data set that is read."""
    domain: str = ""
    """Of rows that name none: math, science, code, chat or codeforces; decides the template."""
    fields: dict[str, str] = field(default_factory=dict)
    """Our name of a field -> theirs, with dots into nested objects; fields not named are called as ours."""
    max_rows: int | None = None
    """At most this many rows, drawn from those that are left after all checks; null for all."""

    @property
    def is_file(self) -> bool:
        """Whether `path` names a file rather than a data set."""
        return Path(self.path).suffix in READERS


MIXES: dict[str, tuple[Source, ...]] = {
    "opdlm": (Source(name="opdlm_train", path="divelab/opdlm_train_data", data_file="opdlm_train.json"),),
    "math": (
        Source(
            name="MATH_train_traceRL",
            path="divelab/opdlm_eval_data",
            data_file="MATH_train_traceRL.json",
            domain="math",
        ),
    ),
    "codeforces": (Source(name="codeforces", path="open-r1/codeforces", config="verifiable", domain="codeforces"),),
}
"""opdlm: 61,816 rows of four domains; math: about 8,000; codeforces: 8,338 problems in the split."""


def read_mix(name_or_file: str) -> tuple[Source, ...]:
    """The sources of a mix by name or from a YAML file.

    Raises:
        ValueError: neither a name nor a file, not YAML, an unknown or missing field, a value of the wrong type.
    """
    if name_or_file in MIXES:
        return MIXES[name_or_file]
    file = Path(name_or_file)
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        raise ValueError(f"--mix ({name_or_file}) must be one of {', '.join(MIXES)} or a YAML file that exists")
    listed = _read_yaml(file)
    sources = tuple(_source(file, number, entry) for number, entry in enumerate(listed, start=1))
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"{file}: the names of sources must differ, and are {', '.join(names)}")
    return sources


def _read_yaml(file: Path) -> list[Any]:
    import yaml

    try:
        mix = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(mix, dict) or list(mix) != ["sources"] or not isinstance(mix["sources"], list):
        raise ValueError(f"{file} must hold `sources:` with a list")
    if not mix["sources"]:
        raise ValueError(f"{file} has no sources")
    return mix["sources"]


def _source(file: Path, number: int, entry: Any) -> Source:
    where = f"{file}: source {number}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping with `name` and `path`")
    known = {declared.name: declared for declared in dataclasses.fields(Source)}
    for name, value in entry.items():
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: {name} is not a field; the nearest is {nearest}")
        _check_type(where, name, value)
    for name in ("name", "path"):
        if not entry.get(name):
            raise ValueError(f"{where} has no {name}")
    source = Source(**entry)
    if source.domain and source.domain not in TEMPLATES:
        raise ValueError(f"{where}: domain ({source.domain}) must be one of {', '.join(TEMPLATES)}")
    if source.max_rows is not None and source.max_rows < 1:
        raise ValueError(f"{where}: max_rows ({source.max_rows}) must be at least 1")
    if unknown := set(source.fields) - set(ROW_FIELDS):
        raise ValueError(f"{where}: fields ({', '.join(sorted(unknown))}) must be of {', '.join(ROW_FIELDS)}")
    beside = file.parent / source.path
    return dataclasses.replace(source, path=str(beside)) if source.is_file or beside.is_dir() else source


def _check_type(where: str, name: str, value: Any) -> None:
    if name == "fields":
        good = isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)
        rule = "a mapping of names to names"
    elif name == "max_rows":
        good, rule = value is None or type(value) is int, "a number or null"
    else:
        good, rule = isinstance(value, str) or (value is None and name in ("config", "data_file")), "text"
    if not good:
        raise ValueError(f"{where}: {name} ({value}) must be {rule}")
