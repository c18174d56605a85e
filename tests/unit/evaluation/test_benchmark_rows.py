"""Rows of benchmarks: from the hub as from a folder, and what is said when they are not there or malformed.

The oracle for rows from the hub is lm-eval's own task for the same data set: its path, and its templates filled with a
row in the data set's schema.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import datasets
import lm_eval.tasks
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import apply_template

from megatron_opdlm.evaluation.benchmarks import BENCHMARKS, TASKS_FOLDER
from megatron_opdlm.evaluation.tasks import rows as rows_module
from megatron_opdlm.evaluation.tasks.hub_rows import CONVERTERS, EVAL_DATA
from megatron_opdlm.evaluation.tasks.rows import load_rows

FIXTURES = Path(__file__).parents[2] / "fixtures" / "benchmarks"
THEIRS = Path(lm_eval.tasks.__file__).parent
QUESTION = {"question": " Which? ", "subject": "law"}
OPTIONS = {"option_a": "w", "option_b": "x", "option_c": "y", "option_d": "z"}


def config(task):
    return load_yaml(TASKS_FOLDER / f"{task}.yaml", resolve_func=False)


@pytest.mark.parametrize(
    ("task", "yaml", "row", "right"),
    [
        ("opdlm_mmlu", "mmlu/default/_default_template_yaml", {"choices": list("wxyz"), "answer": 2}, "C"),
        ("opdlm_ceval", "ceval/_default_ceval_yaml", {"A": "w", "B": "x", "C": "y", "D": "z", "answer": "B"}, "B"),
        ("opdlm_mmmlu_lite", "global_mmlu/default/en/_en_template_yaml", {**OPTIONS, "answer": "D"}, "D"),
    ],
)
def test_choices_read_as_in_the_harness_task_of_the_same_data(task, yaml, row, right):
    theirs = load_yaml(THEIRS / yaml, resolve_func=False)
    row = QUESTION | row
    ours = CONVERTERS[config(task)["dataset_kwargs"]["path"]](row)
    assert theirs["dataset_path"] == config(task)["dataset_kwargs"]["path"]
    prompt = apply_template(theirs["doc_to_text"], row)
    assert ours["question"] == prompt.rpartition("\n")[0]
    assert ours["ground_truth_answer"] == right


@pytest.mark.parametrize(
    ("task", "yaml", "row"),
    [
        (
            "opdlm_math500",
            "hendrycks_math/hendrycks_math500.yaml",
            {"problem": "2 + 2?", "answer": "4", "subject": "Algebra"},
        ),
        ("opdlm_aime24", "aime/aime24.yaml", {"Problem": "2 + 2?", "Answer": 4}),
        ("opdlm_aime25", "aime/aime25.yaml", {"problem": "2 + 2?", "answer": "4"}),
    ],
)
def test_problems_read_as_in_the_harness_task_of_the_same_data(task, yaml, row):
    theirs = load_yaml(THEIRS / yaml, resolve_func=False)
    ours = CONVERTERS[config(task)["dataset_kwargs"]["path"]](row)
    assert theirs["dataset_path"] == config(task)["dataset_kwargs"]["path"]
    assert ours["question"] in apply_template(theirs["doc_to_text"], row)
    assert ours["ground_truth_answer"] == apply_template(theirs["doc_to_target"], row)


def test_gsm8k_answers_are_those_of_the_harness_filter():
    theirs = load_yaml(THEIRS / "gsm8k/gsm8k.yaml", resolve_func=False)
    row = {"question": "How many?", "answer": "Half of 2,500 is <<2500/2=1250>>1,250.\n#### 1,250"}
    pattern = theirs["filter_list"][0]["filter"][0]["regex_pattern"]
    ours = CONVERTERS["openai/gsm8k"](row)
    assert theirs["dataset_path"] == config("opdlm_gsm8k")["dataset_kwargs"]["path"]
    assert ours == {"question": "How many?", "ground_truth_answer": re.search(pattern, row["answer"])[1]}


def test_gpqa_options_are_shuffled_the_same_way_every_time():
    row = {"Question": "Which?", "Correct Answer": "right\n", "High-level domain": "Physics"}
    row |= {f"Incorrect Answer {number}": f"wrong {number}" for number in (1, 2, 3)}
    converted = [CONVERTERS["Idavidrein/gpqa"](row | {"Question": f"Which {n}?"}) for n in range(40)]
    for ours in converted:
        assert f"{ours['ground_truth_answer']}. right" in ours["question"].split("\n")
    assert {ours["ground_truth_answer"] for ours in converted} == set("ABCD")
    assert CONVERTERS["Idavidrein/gpqa"](row | {"Question": "Which 7?"}) == converted[7]


GOOD = '{"question": "q", "ground_truth_answer": "1"}'
LATER = '{"question": "q", "livebench_category": "math", "livebench_task": "x"}'
CODEFORCES = {
    "id": "9000/A", "title": "Half", "description": "Print half of $$$n$$$. ", "input_format": "The line has $$$n$$$.",
    "output_format": "One integer.", "examples": [{"input": "8\n", "output": "4\n"}], "note": None, "rating": 800,
    "input_mode": "stdio", "executable": True, "interaction_format": None, "generated_checker": None,
    "time_limit": 1.5, "official_tests": [{"input": "8\r\n", "output": "4\r\n"}],
}  # fmt: skip


def test_a_codeforces_problem_gets_its_statement_tests_and_time():
    ours = CONVERTERS["open-r1/codeforces"](CODEFORCES)
    assert ours["question"] == (
        "Half\n\nPrint half of $n$.\n\nInput\nThe line has $n$.\n\nOutput\nOne integer.\n\n"
        "Examples\n\nInput\n8\nOutput\n4"
    )
    assert (ours["test_input"], ours["test_output"], ours["test_time_limit"]) == (["8\n"], ["4\n"], 6)


@pytest.mark.parametrize(
    "change",
    [{"input_mode": "file"}, {"generated_checker": "print(1)"}, {"interaction_format": "..."}, {"official_tests": []}],
)
def test_a_codeforces_problem_that_exact_comparison_does_not_cover_is_left_out(change):
    assert CONVERTERS["open-r1/codeforces"](CODEFORCES | change) == {}


def test_rows_come_from_the_hub_without_a_folder(monkeypatch):
    asked = []

    def load_dataset(path, name=None, *, split, **files):
        asked.append((path, name, split, files))
        return [QUESTION | OPTIONS | {"answer": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["French", "Greek"])
    found = load_rows(**config("opdlm_include_lite")["dataset_kwargs"])["test"]
    assert [call[1] for call in asked] == ["French", "Greek"]
    assert [(row["ground_truth_answer"], row["category"], row["letters"]) for row in found] == [
        ("B", "French", "ABCD"),
        ("B", "Greek", "ABCD"),
    ]


def test_a_benchmark_of_no_harness_task_is_a_file_of_the_public_data(monkeypatch):
    row = {"question": "q", "ground_truth_answer": "7", "subdivision": "mt_aime_el"}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, name, *, split, data_files: [row | {"from": (path, split, data_files)}]
    )
    found = load_rows(**config("opdlm_mt_aime24")["dataset_kwargs"])["test"]
    assert found[0]["from"] == (EVAL_DATA, "train", "MT_AIME2024.json")
    assert found[0]["category"] == "mt_aime_el"


def test_a_data_set_that_cannot_be_read_says_what_else_can_be_done(monkeypatch):
    def load_dataset(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'openai/gsm8k' is not there")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"rows of GSM8K cannot be read from the hub's openai/gsm8k .*rows opdlm_gsm8k DIR, then --evaluation.data_dir"
    )
    with pytest.raises(ValueError, match=message):
        load_rows(**config("opdlm_gsm8k")["dataset_kwargs"])


@pytest.mark.parametrize("row", BENCHMARKS, ids=lambda row: row.task)
def test_a_missing_file_says_which_and_the_command_that_gets_it(row, tmp_path):
    with pytest.raises(ValueError) as error:
        load_rows(**config(row.task)["dataset_kwargs"], data_dir=tmp_path)
    command = f"hf download {EVAL_DATA} {row.file} --repo-type dataset --local-dir {tmp_path}"
    if row.task == "opdlm_codeforces":
        command = f"python -m megatron_opdlm.evaluation.tasks.rows opdlm_codeforces {tmp_path}"
    assert str(error.value) == (
        f"evaluation.data_dir ({tmp_path}) has no {row.file}, the rows of {row.name}; get it with: {command}"
    )


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("opdlm_gsm8k", "[{", r"GSM8K.json: not JSON \("),
        ("opdlm_gsm8k", "[]", "GSM8K.json: must be a JSON list of rows"),
        ("opdlm_gsm8k", '{"question": "q"}', "GSM8K.json: must be a JSON list of rows"),
        ("opdlm_gsm8k", "[1]", "GSM8K.json: row 1 must be a JSON object, not int"),
        ("opdlm_gsm8k", f'[{GOOD}, {{"question": "q"}}]', "GSM8K.json: row 2 has no ground_truth_answer"),
        ("opdlm_ifeval", '[{"question": "q"}]', "IFEval.json: row 1 has no instruction_id_list, kwargs"),
        ("opdlm_codeforces", '[{"question": "q"}]', "Codeforces.json: row 1 has no test_input, test_output"),
        ("opdlm_livebench", f"[{LATER}]", "LiveBench.json: row 1 is of the LiveBench task math/x, which has no scorer"),
    ],
)
def test_a_malformed_file_says_where(task, text, message, tmp_path):
    (tmp_path / next(row.file for row in BENCHMARKS if row.task == task)).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(**config(task)["dataset_kwargs"], data_dir=tmp_path)


def humaneval(folder):
    return load_rows(**config("opdlm_humaneval")["dataset_kwargs"], data_dir=folder)["test"]


def test_the_tests_of_evalplus_are_joined_by_task(tmp_path):
    (tmp_path / "HumanEval.json").write_text((FIXTURES / "HumanEval.json").read_text())
    with pytest.raises(ValueError, match=r"has no HumanEvalPlus.jsonl, EvalPlus's tests; get it from https://"):
        humaneval(tmp_path)
    (tmp_path / "HumanEvalPlus-v0.1.10.jsonl.gz").write_bytes(
        gzip.compress((FIXTURES / "HumanEvalPlus.jsonl").read_bytes())
    )
    assert humaneval(tmp_path)[0]["plus_input"] == [[[-3, 0, 7]], [[1.5]]]
    (tmp_path / "HumanEval.json").write_text('[{"task_id": "HumanEval/0", "question": "q"}]')
    with pytest.raises(ValueError, match=r"HumanEvalPlus has no tests for HumanEval/0 \(1 of 1 rows are without\)"):
        humaneval(tmp_path)


def test_rows_with_tests_of_their_own_need_no_release(tmp_path):
    (tmp_path / "HumanEval.json").write_text('[{"task_id": "x", "question": "q", "base_input": [], "plus_input": []}]')
    assert humaneval(tmp_path)[0]["task_id"] == "x"


def test_the_command_writes_the_file_that_a_folder_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [CODEFORCES, CODEFORCES | {"input_mode": "file"}])
    rows_module.main(["opdlm_codeforces", str(tmp_path / "data")])
    assert "1 rows" in capsys.readouterr().out
    again = load_rows(**config("opdlm_codeforces")["dataset_kwargs"], data_dir=tmp_path / "data")["test"]
    assert (again[0]["task_id"], again[0]["time_limit"]) == ("9000/A", 6)
    assert json.loads((tmp_path / "data" / "Codeforces.json").read_text())[0]["category"] == "codeforces"


def test_the_command_refuses_a_task_that_is_none(capsys):
    with pytest.raises(SystemExit) as exit_:
        rows_module.main(["gsm8k", "data"])
    assert exit_.value.code == 2
    assert "TASK is one of opdlm_mmlu, " in capsys.readouterr().err
