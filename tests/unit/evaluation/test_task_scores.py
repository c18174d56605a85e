"""Tasks of lm-evaluation-harness without a model: their requests, and the scores of responses written by hand."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megatron_opdlm.config.schema import Config, DataConfig, EvaluationConfig
from megatron_opdlm.evaluation import lm_eval_tasks
from megatron_opdlm.evaluation.lm_eval_tasks import build_instances, load_tasks, repeats_of, response_requests
from megatron_opdlm.evaluation.responses import Response
from megatron_opdlm.evaluation.task_scores import score_task
from tests.tiny_qwen3 import make_tokenizer
from tests.tiny_tasks import write_task

ROWS = [
    {"question": "1+1=", "answer": "2", "category": "easy"},
    {"question": "2+2=", "answer": "4", "category": "easy"},
    {"question": "9+9=", "answer": "18", "category": "hard"},
]
ANSWER_METRIC = """\
process_results: !function answers.score
"""
ANSWERS = '''
def score(doc, results):
    """The first character is the answer; half a point for an odd one."""
    found = results[0][:1] or None
    return {"accuracy": float(found == doc["answer"]), "points": 0.5, "answer": found}


def share(found):
    return sum(answer is not None for answer in found) / len(found)
'''


@pytest.fixture
def folder(tmp_path):
    return write_task(tmp_path / "tasks", "sums", ROWS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def config_of(folder, *, enable_thinking=False, apply_chat_template=True, **evaluation) -> Config:
    evaluation = {"tasks": ["sums"], "include_path": [str(folder)]} | evaluation
    data = DataConfig(enable_thinking=enable_thinking, apply_chat_template=apply_chat_template)
    return Config(evaluation=EvaluationConfig(**evaluation), data=data)


def requests_of(config, tokenizer):
    task = load_tasks(config).tasks["sums"]
    return response_requests(build_instances(task, tokenizer, config), config, repeats_of(task, config))


def summary_of(config, tokenizer, texts: list[list[str]], **changes) -> dict:
    return scored(config, tokenizer, texts, **changes).summary


def scored(config, tokenizer, texts: list[list[str]], **changes):
    task = load_tasks(config).tasks["sums"]
    blank = Response("sums", 0, 0, "f", "", num_tokens=6, num_steps=2, stop_reason="end_token", call=0, seconds=0.0)
    responses = [
        dataclasses.replace(blank, doc_id=doc_id, repeat=repeat, text=text, **changes)
        for doc_id, row in enumerate(texts)
        for repeat, text in enumerate(row)
    ]
    found = {response.key: response for response in responses}
    return score_task(task, build_instances(task, tokenizer, config), found, config)


def test_requests_have_the_prompt_in_the_chat_template_and_the_settings_of_the_task(folder, tokenizer):
    requests = requests_of(config_of(folder, num_responses=2, system_message="add"), tokenizer)
    assert [request.key for request in requests] == [("sums", doc, repeat) for doc in range(3) for repeat in range(2)]
    assert requests[2].prompt == (
        "<|im_start|>system\nadd<|im_end|>\n<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (requests[0].settings.until, requests[0].settings.max_new_tokens) == (("<|im_end|>",), 32)


def test_requests_are_plain_text_without_a_template_and_at_most_max_tasks(folder, tokenizer):
    requests = requests_of(config_of(folder, apply_chat_template=False, max_tasks=2), tokenizer)
    assert [request.prompt for request in requests] == ["1+1=", "2+2="]


def test_a_prefill_is_the_open_beginning_of_the_response(tmp_path, tokenizer):
    folder = write_task(tmp_path, "sums", ROWS, further="gen_prefix: 'the sum is'")
    assert requests_of(config_of(folder), tokenizer)[0].prompt.endswith("<|im_start|>assistant\nthe sum is")


def test_several_responses_are_averaged_drawn_from_and_voted_on(folder, tokenizer):
    texts = [["1+1=2", "=3", "=3"], ["=4", "=4", "none"], ["=1", "=18", "=1 8"]]
    summary = summary_of(config_of(folder, num_responses=3), tokenizer, texts)
    scores = summary["scores"]["exact_match,last_number"]
    assert scores["mean"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 3) / 3)
    assert scores["pass@2"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert scores["pass@3"] == 1.0
    assert scores["majority"] == pytest.approx(1 / 3)  # 3 twice, 4 twice, and of 1 and 18 the first
    assert summary["categories"] == {
        "easy": {"num_documents": 2, "exact_match,last_number": pytest.approx(0.5)},
        "hard": {"num_documents": 1, "exact_match,last_number": pytest.approx(1 / 3)},
    }


def test_one_response_has_a_mean_and_an_error_only(folder, tokenizer):
    summary = summary_of(config_of(folder), tokenizer, [["=2"], ["=4"], ["=1"]])
    error = (1 / 3 / 3) ** 0.5  # 1, 1, 0: variance 1/3
    assert summary["scores"] == {
        "exact_match,last_number": {"mean": pytest.approx(2 / 3), "stderr": pytest.approx(error)}
    }


def test_what_decoding_took_is_counted_over_all_responses(folder, tokenizer):
    took = summary_of(config_of(folder), tokenizer, [["=2"]] * 3, stop_reason="length")["responses"]
    expected = {"length": 6.0, "tokens_per_step": 3.0, "forwards": 2.0, "end_token_rate": 0.0}
    assert {name: took[name] for name in expected} == expected


def test_thoughts_do_not_count(folder, tokenizer):
    texts = [["=2</think>\n=3"], ["=3</think>\n=4"], ["=18"]]
    means = [
        summary_of(config_of(folder, enable_thinking=thinks), tokenizer, texts)["scores"]["exact_match,last_number"][
            "mean"
        ]
        for thinks in (True, False)
    ]
    assert means == [pytest.approx(2 / 3), pytest.approx(2 / 3)]
    line = scored(config_of(folder, enable_thinking=True), tokenizer, texts).lines[1]
    assert (line["scored_text"], line["response"], line["scores"]) == (
        "=4",
        "=3</think>\n=4",
        {"exact_match,last_number": 1.0},
    )


def test_a_task_can_say_which_answer_its_metrics_found(tmp_path, tokenizer):
    folder = write_task(tmp_path, "sums", [{"question": "q", "answer": "A"}], further=ANSWER_METRIC)
    (folder / "answers.py").write_text(ANSWERS)
    yaml = (folder / "sums.yaml").read_text()
    metrics = "".join(
        f"  - {{metric: {name}, aggregation: {how}, higher_is_better: true}}\n"
        for name, how in (("accuracy", "mean"), ("points", "mean"), ("answer", "!function answers.share"))
    )
    yaml = re.sub(r"filter_list:.*metric_list:\n[^\n]*\n", f"metric_list:\n{metrics}", yaml, flags=re.DOTALL)
    (folder / "sums.yaml").write_text(yaml)
    scores = summary_of(config_of(folder, num_responses=3), tokenizer, [["Because", "A, as", "Aha"]])["scores"]
    assert scores["accuracy,none"] == {
        "mean": pytest.approx(2 / 3),
        "stderr": None,
        "pass@2": 1.0,
        "pass@3": 1.0,
        "majority": 1.0,
    }
    assert scores["points,none"] == {"mean": 0.5, "stderr": None}, "parts of a point are not voted on"
    assert set(scores) == {"accuracy,none", "points,none"}


def test_a_task_that_makes_one_score_of_several_responses_gets_as_many(tmp_path, tokenizer):
    folder = write_task(tmp_path, "sums", ROWS[:1], further="repeats: 3")
    yaml = (folder / "sums.yaml").read_text()
    vote = "      - function: majority_vote\n      - function: take_first\n"
    (folder / "sums.yaml").write_text(yaml.replace("      - function: take_first\n", vote))
    config = config_of(folder, num_responses=2)
    assert len(requests_of(config, tokenizer)) == 6
    scores = summary_of(config, tokenizer, [["=2", "=2", "=3", "=3", "=3", "=2"]])["scores"]
    assert scores["exact_match,last_number"]["mean"] == 0.5
    assert scores["exact_match,last_number"]["pass@2"] == 1.0


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({}, ["sum"], "evaluation.tasks (sum) is not a task; the nearest is sums"),
        (
            {"output_type": "loglikelihood"},
            ["sums"],
            "evaluation.tasks (sums) is scored by loglikelihood, which a block-diffusion model does not give",
        ),
        (
            {"further": "unsafe_code: true"},
            ["sums"],
            "evaluation.tasks (sums) runs what the model writes without a sandbox",
        ),
    ],
)
def test_a_task_that_does_not_fit_is_refused_by_name(tmp_path, monkeypatch, changes, names, message):
    only_folder = lm_eval_tasks._task_manager.__wrapped__  # the harness's own definitions take ten seconds
    monkeypatch.setattr(lm_eval_tasks, "_task_manager", lambda *where, **_: only_folder(*where, include_defaults=False))
    folder = write_task(tmp_path, "sums", ROWS, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_tasks(config_of(folder, tasks=names))


def test_a_missing_data_set_names_itself_and_the_command_that_gets_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yaml = (write_task(tmp_path, "sums", ROWS) / "sums.yaml").read_text()
    yaml = yaml.replace(
        "custom_dataset: !function rows_sums.load", "dataset_path: json\ndataset_kwargs: {data_files: absent.json}"
    )
    (tmp_path / "sums.yaml").write_text(yaml)
    with pytest.raises(
        ValueError, match=r"\(sums\): its data set is not there: .*absent.json.*hf download --repo-type"
    ):
        load_tasks(config_of(tmp_path))


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(lm_eval_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape('pip install "megatron-opdlm[eval]"')):
        lm_eval_tasks.require_lm_eval()
