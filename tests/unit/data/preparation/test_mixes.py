"""Mixes: what is refused of a file, and rows of files and data sets in our form."""

from __future__ import annotations

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_opdlm.data.preparation.mixes import MIXES, Source, read_mix
from megatron_opdlm.data.preparation.source_rows import open_source, our_form


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [{name: a, paht: b.jsonl}]", "mix.yaml: source 1: paht is not a field; the nearest is path"),
        ("sources: [{name: a}]", "source 1 has no path"),
        ("sources: [{name: a, path: b, max_rows: 0}]", r"max_rows \(0\) must be at least 1"),
        ("sources: [{name: a, path: b, max_rows: many}]", r"max_rows \(many\) must be a number or null"),
        ("sources: [{name: a, path: b, fields: [x]}]", "must be a mapping of names to names"),
        ("sources: [{name: a, path: b, fields: {answer: x}}]", r"fields \(answer\) must be of question, ground"),
        ("sources: [{name: a, path: b, domain: maths}]", r"domain \(maths\) must be one of math, science"),
        ("sources: [{name: 3, path: b}]", r"name \(3\) must be text"),
        ("sources: [{name: a, path: b}, {name: a, path: c}]", "names of sources must differ"),
        ("sources: [a]", "source 1 must be a mapping"),
        ("sources: []", "has no sources"),
        ("- a", "must hold `sources:`"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_bad_mix_is_refused_with_the_place(text, message, tmp_path):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mix(str(tmp_path / "mix.yaml"))


def test_a_mix_that_is_neither_a_name_nor_a_file_is_refused():
    with pytest.raises(ValueError, match=r"--mix \(opdml\) must be one of opdlm, math, codeforces or a YAML file"):
        read_mix("opdml")


def test_paths_of_a_mix_are_relative_to_it_and_ids_of_the_hub_stay(tmp_path):
    (tmp_path / "mix.yaml").write_text("sources: [{name: a, path: b.jsonl}, {name: c, path: somebody/something}]")
    assert [source.path for source in read_mix(str(tmp_path / "mix.yaml"))] == [
        str(tmp_path / "b.jsonl"),
        "somebody/something",
    ]


def test_named_mixes_are_read_from_the_hub():
    assert not any(source.is_file for mix in MIXES.values() for source in mix)
    assert read_mix("codeforces") == MIXES["codeforces"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that `datasets` loads as it loads a data set of the hub, without a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    return folder


def test_one_file_of_a_data_set_is_read_as_a_file_on_disk(hub):
    rows = [{"question": f"{n}?", "ground_truth_answer": str(n), "domain": "math", "source": "s"} for n in range(5)]
    (hub / "train.json").write_text(json.dumps(rows))
    (hub / "other.json").write_text("[]")
    opened = open_source(Source(name="own", path=str(hub), data_file="train.json"))
    assert [row for _, row in opened.read(3, 9)] == rows[3:]
    assert [place for place, _ in opened.read(0, 1)] == [f"{hub}: row 1"]
    direct = open_source(Source(name="own", path=str(hub / "train.json")))
    assert [row for _, row in direct.read(0, 9)] == rows
    assert opened.num_rows == direct.num_rows == 5
    assert open_source(opened.source).fingerprint == opened.fingerprint  # so a stopped preparation finds its folder
    (hub / "train.json").write_text(json.dumps(rows[:2]))
    assert open_source(opened.source).fingerprint != opened.fingerprint
    assert open_source(direct.source).fingerprint != direct.fingerprint


def test_the_training_problems_of_codeforces_are_read_by_configuration_and_split(hub):
    problem = {"id": "1/A", "title": "Half", "description": "Print half of $$$n$$$.", "examples": []}
    judged = {"input_mode": "stdio", "executable": True, "official_tests": [{"input": "8", "output": "4"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([problem | judged]), hub / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([problem | judged] * 2), hub / "test.parquet")
    files = "[{split: train, path: train.parquet}, {split: test, path: test.parquet}]"
    (hub / "README.md").write_text(f"---\nconfigs:\n- config_name: verifiable\n  data_files: {files}\n---\n")
    source = MIXES["codeforces"][0]
    opened = open_source(Source(**{**vars(source), "path": str(hub)}))
    assert [row for _, row in opened.read(0, 9)] == [
        {
            "question": "Half\n\nPrint half of $n$.",
            "ground_truth_answer": None,
            "domain": "codeforces",
            "source": "codeforces",
        }
    ]


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"source a: the data set .* cannot be read"):
        open_source(Source(name="a", path=str(tmp_path / "nothing")))


def test_fields_with_dots_reach_into_nested_objects():
    source = Source(name="dapo", path="x", fields={"question": "prompt", "ground_truth_answer": "reward.truth"})
    row = {"prompt": [{"role": "user", "content": "1+1=?"}], "reward": {"truth": 2}}
    assert our_form(row, source) == {
        "question": "1+1=?",
        "ground_truth_answer": "2",
        "domain": "",
        "source": "dapo",
    }
    assert our_form({"prompt": "1?", "reward": "none"}, source)["ground_truth_answer"] is None
