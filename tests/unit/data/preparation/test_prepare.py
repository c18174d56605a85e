"""A preparation drops what it should, counts it, ends in the same bytes however often stopped, and can be read."""

from __future__ import annotations

import json
import statistics as python_statistics
from pathlib import Path

import pytest

from megatron_opdlm.data.preparation import prepare as prepare_module
from megatron_opdlm.data.preparation.mixes import Source
from megatron_opdlm.data.preparation.prepare import Settings, prepare, shard_names
from megatron_opdlm.data.preparation.statistics import markdown, token_lengths
from megatron_opdlm.data.preparation.templates import TEMPLATES, with_template
from megatron_opdlm.data.prompts import read_prompts, read_rows
from tests.unit.data.conftest import build_tokenizer

SETTINGS = Settings(seed=1, rows_per_shard=4, rows_per_part=5)
BOXED = TEMPLATES["math"].removeprefix("{question}")


class Killed(BaseException):
    """Nothing of ours catches it, so the disk is as a kill leaves it."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_questions(folder: Path) -> list:
    return [row["question"] for path in sorted(folder.glob("*.parquet")) for _, row in read_rows(path)]


def user_text(messages) -> str:
    return messages[-1]["content"]


def test_every_row_is_kept_or_dropped_for_the_reason_that_it_was_written_for(mix, checks, tmp_path):
    found = prepare(mix, checks, SETTINGS, {}, tmp_path / "out")
    none = dict.fromkeys(found["all"]["dropped"], 0)
    sources = {name: (group["rows"], group["kept"], group["dropped"]) for name, group in found["sources"].items()}
    assert sources == {
        "general": (12, 6, none | {"malformed": 2, "in_evaluation": 2, "too_long": 1, "duplicate": 1}),
        "sums": (7, 4, none | {"duplicate": 1, "over_max_rows": 2}),
        "problems": (2, 1, none | {"unfit": 1}),
    }
    assert {name: group["kept"] for name, group in found["kept_by_domain"].items()} == {
        "chat": 2,
        "code": 2,
        "math": 6,
        "science": 1,
    }


def test_the_rows_are_those_of_the_sources_in_their_templates(mix, checks, tmp_path):
    prepare(mix, checks, SETTINGS, {}, tmp_path)
    rows = [row for path in sorted(tmp_path.glob("*.parquet")) for _, row in read_rows(path)]
    # one of the prompts is a conversation, so all are, for a column has one type
    said = {user_text(row["question"]): row for row in rows}
    assert said[f"What is 17 + 25?{BOXED}"]["ground_truth_answer"] == "42"
    assert said[f"What is 17 - 25?{BOXED}"]["source"] == "sums"
    assert len(said["How late?"]["question"]) == 3
    assert said["Tell me a story."]["question"] == [{"role": "user", "content": "Tell me a story."}]
    assert said["Write a function `half(n)` that returns half of an even number."]["domain"] == "code"
    doubled = next(text for text in said if "Print twice $n$." in text)
    assert doubled.startswith("This is the problem:\nDouble\n\n")
    assert (said[doubled]["domain"], said[doubled]["source"]) == ("code", "problems")
    drawn = [row["ground_truth_answer"] for row in rows if row["source"] == "sums" and row["domain"] == "math"]
    assert len(drawn) == 6 and all(text.lstrip("-").isdigit() for text in drawn)


def test_a_mix_without_conversations_is_written_as_text(mix, checks, tmp_path):
    prepare(mix[1:2], checks, SETTINGS, {}, tmp_path)
    assert all(text.endswith(BOXED) for text in read_questions(tmp_path))


def test_the_shards_are_what_training_reads(mix, checks, tmp_path):
    found = prepare(mix, checks, SETTINGS, {}, tmp_path)
    shards = sorted(tmp_path.glob("*.parquet"))
    assert [path.name for path in shards] == [name for name, _ in shard_names(11, 4)]
    prompts = read_prompts(
        shards, build_tokenizer(), max_prompt_tokens=512, apply_chat_template=True, enable_thinking=False
    )
    assert (len(prompts.prompts), prompts.num_too_long) == (found["all"]["kept"], 0)
    lengths = [len(prompt.token_ids) for prompt in prompts.prompts]
    tokens = found["all"]["tokens"]
    assert (tokens["sum"], tokens["max"], tokens["mean"]) == (
        sum(lengths),
        max(lengths),
        round(python_statistics.fmean(lengths), 2),
    )


@pytest.mark.parametrize("before_rename", [False, True])
def test_a_preparation_that_is_killed_anywhere_ends_in_the_same_bytes(
    before_rename, mix, checks, tmp_path, monkeypatch
):
    prepare(mix, checks, SETTINGS, {}, tmp_path / "whole")
    whole, rename, remaining = contents(tmp_path / "whole"), Path.replace, [0]

    def replace(path, target):
        remaining[0] -= 1
        if before_rename and remaining[0] == 0:
            path.write_bytes(path.read_bytes()[:10])  # half of it is on the disk
            raise Killed
        rename(path, target)
        if remaining[0] == 0:
            raise Killed

    monkeypatch.setattr(Path, "replace", replace)
    kills = 0
    for number in range(1, 100):
        output, remaining[0] = tmp_path / f"killed_{number}", number
        try:
            prepare(mix, checks, SETTINGS, {}, output)
            break
        except Killed:
            kills += 1
        prepare(mix, checks, SETTINGS, {}, output)
        assert contents(output) == whole
    assert kills == 12  # settings, six parts, three shards, two forms of statistics


def test_what_is_there_is_not_made_again(mix, checks, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_write_shards", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(mix, checks, SETTINGS, {}, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(type(checks), "examine", lambda *_: pytest.fail("examined again"))
    prepare(mix, checks, SETTINGS, {}, tmp_path)
    assert prepare(mix, checks, SETTINGS, {}, tmp_path)["all"]["kept"] == 11
    assert not list(tmp_path.glob("parts*"))


def test_the_parts_do_not_decide_what_is_written(mix, checks, tmp_path):
    prepare(mix, checks, SETTINGS, {}, tmp_path / "five")
    prepare(mix, checks, Settings(seed=1, rows_per_shard=4, rows_per_part=1000), {}, tmp_path / "all")
    assert contents(tmp_path / "five") == contents(tmp_path / "all")


def test_another_seed_gives_the_same_general_rows_in_another_order(mix, checks, tmp_path):
    for seed in (1, 2):
        prepare(mix[:1], checks, Settings(seed=seed), {}, tmp_path / str(seed))
    first, second = (read_questions(tmp_path / seed) for seed in "12")
    assert first != second and sorted(map(str, first)) == sorted(map(str, second))


def test_a_folder_of_other_settings_is_refused(mix, checks, tmp_path):
    prepare(mix, checks, SETTINGS, {"ngram": 13}, tmp_path)
    with pytest.raises(ValueError, match=r"--output .* holds a preparation with another ngram"):
        prepare(mix, checks, SETTINGS, {"ngram": 12}, tmp_path)
    with pytest.raises(ValueError, match="another sources"):
        prepare(mix[:1], checks, SETTINGS, {"ngram": 13}, tmp_path)


def test_a_folder_with_something_else_is_left_alone(mix, checks, tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="must be empty, or hold an earlier preparation"):
        prepare(mix, checks, SETTINGS, {}, tmp_path)


def test_a_mix_of_which_nothing_is_left_is_an_error_with_the_reasons(mix, checks, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"question": "x" * 600}))
    source = Source(name="one", path=str(tmp_path / "one.jsonl"))
    with pytest.raises(ValueError, match=r"of 1 rows none is left: .*'too_long': 1"):
        prepare([source], checks, SETTINGS, {}, tmp_path / "out")


def test_duplicates_are_what_comparing_all_with_all_finds(checks, tmp_path):
    texts = [f"{'A' if n % 3 else 'a'} {n % 7}+{n % 4}  is?" for n in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps({"question": text}) for text in texts))
    plain = [" ".join(text.lower().split()) for text in texts]
    expected = [texts[n] for n in range(60) if not any(plain[m] == plain[n] for m in range(n))]
    source = Source(name="sums", path=str(tmp_path / "sums.jsonl"))
    prepare([source], checks, SETTINGS, {}, tmp_path / "out")
    assert sorted(read_questions(tmp_path / "out")) == sorted(expected)


def test_percentiles_are_nearest_ranks():
    lengths = [*range(1, 101)]
    assert (token_lengths(lengths)["p50"], token_lengths(lengths)["p95"]) == (50, 95)
    assert token_lengths([7]) == {"sum": 7, "mean": 7.0, "min": 7, "max": 7, "p50": 7, "p95": 7}
    assert token_lengths([3, 1, 2]) == {"sum": 6, "mean": 2.0, "min": 1, "max": 3, "p50": 2, "p95": 3}
    assert token_lengths([]) == {}


def test_the_table_has_the_counts_of_every_source(mix, checks, tmp_path):
    text = markdown(prepare(mix, checks, SETTINGS, {}, tmp_path))
    assert text == (tmp_path / "statistics.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["sums", "7", "4", "0", "0", "0", "0", "1", "2"] in lines
    assert with_template("", "math") == BOXED
