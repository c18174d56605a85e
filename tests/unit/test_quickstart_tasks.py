"""The quickstart's tasks and its shipped teacher: arithmetic checked by Python, disjointness by the sets themselves."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

from megatron_opdlm.evaluation.verifiable_tasks import read_tasks, score_response

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
TEACHER = QUICKSTART / "teacher"


def load_script(name: str) -> ModuleType:
    """A script of the folder as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    return load_script("tasks")


@pytest.fixture
def make_teacher(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(QUICKSTART)  # it imports `tasks`, which stands beside it
    return load_script("make_teacher")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TEACHER)


def expressions(rows: list[dict]) -> set[str]:
    return {row["entry"]["metadata"]["expression"] for row in rows}


def test_the_three_sets_share_no_expression(tasks):
    sets = [expressions(list(islice(tasks.iterate_tasks(name, seed=5), 2000))) for name in tasks.BUCKETS]
    assert all(len(s) > 1000 for s in sets)
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_every_expression_belongs_to_exactly_one_set_of_the_stated_share(tasks):
    assert sorted(b for buckets in tasks.BUCKETS.values() for b in buckets) == list(range(tasks.NUM_BUCKETS))
    names = [tasks.task_set_of(f"{a} + {b}") for a in range(100) for b in range(100)]
    for name, buckets in tasks.BUCKETS.items():
        assert names.count(name) / len(names) == pytest.approx(len(buckets) / tasks.NUM_BUCKETS, abs=0.02)


def test_the_set_of_an_expression_never_changes(tasks):
    found = [tasks.task_set_of(text) for text in ("1 + 2", "23 + 45 - 7", "44 + 27 - 33", "1 + 5")]
    assert found == ["teacher", "teacher", "heldout", "train"]


@pytest.mark.parametrize(
    ("expression", "response"),
    [
        ("23 + 45 - 7", "23+45=68\n68-7=61"),
        ("5 - 9", "5-9=-4"),
        ("10 - 99 - 98", "10-99=-89\n-89-98=-187"),
        ("0 + 0 + 7", "0+0=0\n0+7=7"),
    ],
)
def test_the_running_sums_are_written_left_to_right(tasks, expression, response):
    assert tasks.running_sums(expression) == response


def test_every_step_of_a_response_is_true_and_the_last_is_the_answer(tasks):
    for row in tasks.draw_distinct("train", 300, seed=2):
        steps = [line.split("=") for line in row["response"].split("\n")]
        assert all(eval(left) == int(right) for left, right in steps)
        assert eval(row["entry"]["metadata"]["expression"]) == int(steps[-1][1]) == int(row["ground_truth_answer"])
        assert score_response(row, row["response"]) == 1.0


def test_the_command_writes_the_same_distinct_rows_each_time(tasks, tmp_path):
    for run in ("a", "b"):
        tasks.write_tasks(tmp_path / run, num_train=40, num_heldout=20, seed=0)
    for name, count in (("train", 40), ("heldout", 20)):
        first, second = (tmp_path / run / f"{name}.jsonl" for run in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()
        rows = read_tasks(first)
        assert len(expressions(rows)) == len(rows) == count
        assert {tasks.task_set_of(e) for e in expressions(rows)} == {name}
    tasks.write_tasks(tmp_path / "c", num_train=40, num_heldout=20, seed=1)
    assert (tmp_path / "a" / "train.jsonl").read_bytes() != (tmp_path / "c" / "train.jsonl").read_bytes()


def test_neighbouring_seeds_give_unrelated_tasks(tasks):
    first, second = ([r["question"] for r in islice(tasks.iterate_tasks("teacher", s), 20)] for s in (0, 1))
    assert sum(question in first for question in second) < 5


@pytest.mark.parametrize("num_rows", [0, 100_001])
def test_a_number_of_tasks_that_cannot_be_had_is_refused(tasks, num_rows):
    with pytest.raises(ValueError, match=rf"number of heldout tasks \({num_rows}\) must be between"):
        tasks.draw_distinct("heldout", num_rows, seed=0)


def test_help_imports_neither_torch_nor_reasoning_gym():
    code = "import sys, runpy; sys.argv = [sys.argv[1], '--help']; sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "except SystemExit: print('HEAVY', {'torch', 'transformers', 'reasoning_gym'} & set(sys.modules))"
    for name in ("tasks", "make_teacher"):
        command = [sys.executable, "-c", code, str(QUICKSTART / f"{name}.py")]
        assert "HEAVY set()" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_tokenizer_gives_digits_signs_and_newlines_tokens_of_their_own(tokenizer):
    text = "23+45=68\n-7"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == list(text.replace("\n", "Ċ"))


def test_the_tokenizer_spells_any_text_and_gives_it_back(tokenizer):
    text = "héllo\r\n\n  ünï  12.5 <think>日本</think><tool_call>\t<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_format_is_qwen3s_and_inserts_no_think_block(tokenizer):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    expected = "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    for thinking in (True, False):
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert text == expected + "<|im_start|>assistant\n"


def test_the_added_tokens_are_qwen3s_and_leave_room_for_a_mask_token(tokenizer):
    config = json.loads((TEACHER / "config.json").read_text())
    assert list(tokenizer.get_added_vocab())[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert {"<think>", "</think>", "<tool_call>", "</tool_call>"} < set(tokenizer.get_added_vocab())
    assert tokenizer.mask_token is None and "<|MASK|>" not in tokenizer.get_vocab()
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) < config["vocab_size"] and config["vocab_size"] % 64 == 0


def test_a_shipped_folder_is_small_and_readable_by_transformers_4_and_5():
    config = json.loads((TEACHER / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert json.loads((TEACHER / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) < 12e6


def test_training_labels_are_the_response_and_its_end_alone(tasks, tokenizer, make_teacher):
    rows = [tasks.make_row(entry_of("5 - 9", "-4")), tasks.make_row(entry_of("23 + 45 - 7", "61"))]
    ids_BT, labels_BT = make_teacher.make_batch(tokenizer, rows)
    assert ids_BT.shape == labels_BT.shape
    for row, ids_T, labels_T in zip(rows, ids_BT, labels_BT, strict=True):
        is_labelled_T = labels_T != make_teacher.IGNORED
        assert tokenizer.decode(labels_T[is_labelled_T]) == row["response"] + "<|im_end|>"
        assert labels_T[:-1][is_labelled_T[:-1]].tolist() == ids_T[1:][is_labelled_T[:-1]].tolist()


def entry_of(expression: str, answer: str) -> dict:
    return {"question": f"{expression} =", "answer": answer, "metadata": {"expression": expression, "range": (2, 3)}}


def test_the_shipped_teacher_solves_held_out_tasks(tasks, tokenizer, make_teacher):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TEACHER).eval()
    rows = tasks.draw_distinct("heldout", 32, seed=0)
    responses = make_teacher.respond(model, tokenizer, rows)
    assert sum(score_response(row, text) == 1.0 for row, text in zip(rows, responses, strict=True)) >= 30
