"""Golden tests of the paper's benchmarks: each loads through lm-eval, asks what the paper asks and scores as it does.

`tests/fixtures/benchmarks` is an `evaluation.data_dir` with rows written for these tests, in the schema of the public
data; `prompts.json` has each task's first prompt as chat messages, `responses.json` right, wrong and malformed
responses with their scores.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from megatron_opdlm.evaluation.benchmarks import BENCHMARKS, GROUPS, TASKS_FOLDER, benchmark

FIXTURES = Path(__file__).parents[2] / "fixtures" / "benchmarks"
PROMPTS = json.loads((FIXTURES / "prompts.json").read_text())
RESPONSES = json.loads((FIXTURES / "responses.json").read_text())
TASKS = [row.task for row in BENCHMARKS]
CODE = [row.task for row in BENCHMARKS if row.domain == "code"]
HAS_SANDBOX = importlib.util.find_spec("megatron_opdlm.evaluation.code_answers") is not None


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata={"data_dir": str(FIXTURES)})


@pytest.fixture(scope="module")
def load(manager):
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = manager.load(name)["tasks"][name]
        return loaded[name]

    return load


@pytest.fixture(scope="module", autouse=True)
def nothing_is_fetched():
    """lm-eval's IFEval downloads `punkt_tab` when it is imported, which none of these instructions needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nltk.download", lambda *_: False)
        yield


def cases(names):
    return [(name, number) for name in names for number in range(len(RESPONSES[name]))]


def is_code(row):
    return row.get("livebench_category") == "coding"


def check(task, case):
    doc = task.eval_docs[case["row"]]
    if is_code(doc) and not HAS_SANDBOX:
        pytest.skip("code runs in the sandbox")
    scores = task.process_results(doc, [case["response"]])
    assert scores == {
        key: pytest.approx(value) if isinstance(value, float) else value for key, value in case["scores"].items()
    }


def test_every_benchmark_of_the_table_has_a_task_prompts_and_responses(manager):
    assert sorted(TASKS) == sorted(PROMPTS) == sorted(RESPONSES) == manager.all_subtasks
    assert sorted(GROUPS) == manager.all_groups


@pytest.mark.parametrize("name", TASKS)
def test_a_task_asks_as_the_paper_does(load, name):
    task = load(name)
    task.build_all_requests(
        limit=1, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=lambda messages, **_: messages
    )
    prompt, generation = task.instances[0].args
    assert prompt == PROMPTS[name]
    assert generation == {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 16000}
    assert benchmark(name).max_new_tokens == generation["max_gen_toks"]


@pytest.mark.parametrize(("name", "number"), cases(name for name in TASKS if name not in CODE))
def test_a_task_scores_a_response(load, name, number):
    check(load(name), RESPONSES[name][number])


@pytest.mark.skipif(not HAS_SANDBOX, reason="code runs in the sandbox")
@pytest.mark.parametrize(("name", "number"), cases(CODE))
def test_a_task_scores_a_program(load, name, number):
    check(load(name), RESPONSES[name][number])


def test_every_metric_of_a_task_has_an_aggregation(load):
    for name in TASKS:
        for case in RESPONSES[name]:
            assert set(case["scores"]) == set(load(name).aggregation()), name


def test_several_responses_have_their_scores_side_by_side(load):
    task = load("opdlm_gsm8k")
    texts = ["\\boxed{252}", "\\boxed{1}", "no"]
    assert task.process_results(task.eval_docs[0], [texts]) == {
        "accuracy": [1.0, 0.0, 0.0],
        "answer": ["252", "1", None],
    }
    assert task.aggregation()["answer"](["252", "1", None]) == pytest.approx(2 / 3)


def test_a_chinese_row_is_asked_in_chinese(load):
    task = load("opdlm_livemathbench_hard")
    assert task.doc_to_text(task.eval_docs[1]) == (
        "下面是一个数学问题，请逐步推理，并把最终答案放置于\\boxed{}中。\n求 $2^5$ 的值。\n"
    )


def test_rows_name_their_category(load):
    categories = {name: load(name).eval_docs[0]["category"] for name in TASKS}
    assert categories["opdlm_math500"] == "Counting & Probability"
    assert categories["opdlm_livebench"] == "math"
    assert categories["opdlm_livecodebench_v6"] == "atcoder"
    assert categories["opdlm_gsm8k"] == ""


def test_a_group_has_the_tasks_of_the_paper_and_their_mean(manager):
    loaded = manager.load("opdlm_math")
    group = loaded["groups"]["opdlm_math"]
    assert tuple(loaded["tasks"]) == GROUPS["opdlm_math"]
    assert [metric.metric for metric in group.aggregate_metric_list] == ["accuracy"]
    for name, members in GROUPS.items():
        assert tuple(manager.task_index[name].cfg["task"]) == members


def test_follow_up_instructions_agree_with_the_harness_task(load):
    from lm_eval.tasks.ifeval.utils import process_results

    for case in RESPONSES["opdlm_ifeval"]:
        row = load("opdlm_ifeval").eval_docs[case["row"]]
        text = case["response"].rpartition("</think>\n\n")[2]
        theirs = process_results(row | {"prompt": row["question"]}, [text])
        ours = load("opdlm_ifeval").process_results(row, [case["response"]])
        assert ours["accuracy"] == float(theirs["prompt_level_strict_acc"])
        followed = theirs["inst_level_strict_acc"]
        assert ours["instruction_accuracy"] == sum(followed) / len(followed)


def test_the_harness_itself_aggregates_what_the_tasks_give(manager):
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    class SaysTheSame(LM):
        def generate_until(self, requests):
            return ["\\boxed{252}, or in letters \\boxed{B}" for _ in requests]

        def loglikelihood(self, requests):
            raise AssertionError("no task asks for this")

        loglikelihood_rolling = loglikelihood

    tasks = manager.load(["opdlm_gsm8k", "opdlm_mmlu", "opdlm_zebralogic"])
    results = evaluate(SaysTheSame(), tasks, bootstrap_iters=0, log_samples=False)["results"]
    assert (results["opdlm_mmlu"]["accuracy,none"], results["opdlm_mmlu"]["answer,none"]) == (1.0, 1.0)
    assert (results["opdlm_gsm8k"]["accuracy,none"], results["opdlm_gsm8k"]["answer,none"]) == (0.0, 1.0)
    assert results["opdlm_zebralogic"]["cell_accuracy,none"] == 0.0
