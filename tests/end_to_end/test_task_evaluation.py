"""Evaluation on tasks of lm-evaluation-harness, with a model: the harness's own back end agrees; killed runs go on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import lm_eval
import pytest
import torch.multiprocessing as mp

from examples.quickstart.tasks import draw_distinct
from megatron_opdlm.config.schema import Config, EvaluationConfig, RolloutConfig, TeacherConfig
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.tiny_tasks import sum_rows, write_task
from tests.worlds import LAYOUTS, remove_parallel_groups, tiny_config

TEACHER = Path(__file__).parents[2] / "examples" / "quickstart" / "teacher"
NUM_ROWS = 128
SAMPLED = "{until: ['<|im_end|>', '9', '+s'], do_sample: true, temperature: 1.5, max_gen_toks: 12}"
NUM_DOCUMENTS, NUM_RESPONSES = 6, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and two tasks that it answers at random."""
    root = tmp_path_factory.mktemp("evaluation")
    make_tiny_qwen3(root / "hf", seed=5)
    for name in ("sums", "more"):
        write_task(root / "tasks", name, sum_rows(NUM_DOCUMENTS), generation=SAMPLED)
    return root


@pytest.fixture(autouse=True)
def no_groups_left(world_of_one):
    yield
    remove_parallel_groups()


def config_of(folder: Path, output: Path, **evaluation) -> Config:
    settings = {"tasks": ["sums", "more"], "num_responses": NUM_RESPONSES, "output": str(output)} | evaluation
    return tiny_config(
        folder / "hf",
        rollout=RolloutConfig(dynamic_threshold=0.12, batch_size=2),
        evaluation=EvaluationConfig(include_path=[str(folder / "tasks")], **settings),
    )


def evaluate(config: Config) -> dict | None:
    """The results without what depends on the clock."""
    from megatron_opdlm.evaluation.harness import TaskEvaluation

    evaluation = TaskEvaluation(config)
    evaluation.decode()
    return timeless(evaluation.results())


def timeless(results: dict | None) -> dict | None:
    return results and results | {"seconds": dict.fromkeys(results["seconds"], 0.0)}


def lines_below(output: Path) -> list[dict]:
    files = sorted((output / "responses").glob("*/*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def test_the_teacher_writes_what_the_harness_own_back_end_writes(tmp_path):
    from lm_eval.models.huggingface import HFLM

    from megatron_opdlm.evaluation.lm_eval_model import MegatronOpdlm

    rows = [
        {"question": row["question"], "answer": row["ground_truth_answer"]}
        for row in draw_distinct("heldout", NUM_ROWS, seed=0)
    ]
    generation = "{until: ['<|im_end|>'], do_sample: false, max_gen_toks: 32}"
    tasks = write_task(tmp_path, "sums", rows, generation=generation)
    evaluation = EvaluationConfig(role="teacher", tasks=["sums"], include_path=[str(tasks)])
    config = dataclasses.replace(tiny_config(TEACHER), teacher=TeacherConfig(hf=str(TEACHER)), evaluation=evaluation)
    ours = harness_results(MegatronOpdlm(config), tasks)
    theirs = harness_results(HFLM(pretrained=str(TEACHER), dtype="float32", device="cpu", batch_size=NUM_ROWS), tasks)
    same = [mine[0] == other[0] for mine, other in zip(ours[0], theirs[0], strict=True)]
    print(f"{sum(same)} of {len(same)} responses are the same; accuracy {ours[1]} and {theirs[1]}")
    assert sum(same) >= 0.99 * NUM_ROWS
    assert ours[1] == theirs[1] > 0.8


def harness_results(model, tasks: Path) -> tuple[list[list[str]], float]:
    """The harness's texts and score."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, tasks=["sums"], task_manager=manager, apply_chat_template=True, bootstrap_iters=0
    )
    samples = sorted(results["samples"]["sums"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0] for sample in samples], results["results"]["sums"]["exact_match,last_number"]


def test_likelihoods_are_refused(folder):
    from megatron_opdlm.evaluation.lm_eval_model import MegatronOpdlm

    model = MegatronOpdlm(config_of(folder, folder / "unused"))
    for ask in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(ValueError, match="output_type: generate_until"):
            ask([])


def killed_evaluation(rank: int, config: Config, num: int) -> None:
    """Is killed while it writes response number `num`, half of which is on disk then."""
    from megatron_opdlm.evaluation.responses import ResponseStore

    append, written = ResponseStore.append, []

    def append_until_killed(store: ResponseStore, response) -> None:
        append(store, response)
        written.append(response)
        if len(written) == num:
            path = next(store.folder.glob(f"{response.task}/*.jsonl"))
            os.truncate(path, path.stat().st_size - 20)
            os.kill(os.getpid(), signal.SIGKILL)

    ResponseStore.append = append_until_killed
    evaluate(config)


def test_a_killed_evaluation_goes_on_and_ends_as_if_nothing_had_been(folder, tmp_path):
    expected = evaluate(config_of(folder, tmp_path / "whole"))
    config = config_of(folder, tmp_path / "killed")
    for num in (4, 11):  # in the first task, and in the second one
        with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
            run_on_ranks(killed_evaluation, 1, config, num)
    remove_parallel_groups()
    assert evaluate(config) == expected
    texts = [(tmp_path / name / "responses" / "sums.jsonl").read_bytes() for name in ("whole", "killed")]
    assert texts[0] == texts[1]


def test_nothing_is_decoded_twice(folder, tmp_path, monkeypatch):
    from megatron_opdlm.evaluation.evaluated_model import OpenedModel

    config = config_of(folder, tmp_path)
    expected = evaluate(config)
    assert len(lines_below(tmp_path)) == 2 * NUM_DOCUMENTS * NUM_RESPONSES
    monkeypatch.setattr(OpenedModel, "load", lambda *_: pytest.fail("there is nothing to decode"))
    assert evaluate(config) == expected


def test_other_settings_are_decoded_anew_beside_what_is_there(folder, tmp_path):
    first = evaluate(config_of(folder, tmp_path))
    second = evaluate(config_of(folder, tmp_path, temperature=0.0))
    assert first != second
    assert len(lines_below(tmp_path)) == 2 * 2 * NUM_DOCUMENTS * NUM_RESPONSES
    assert evaluate(config_of(folder, tmp_path)) == first


def evaluate_on_rank(rank: int, config: Config) -> dict | None:
    return evaluate(config)


@pytest.mark.parametrize(
    "name", ["tensor parallel 1", "tensor parallel 2"], ids=["data parallel 2", "tensor parallel 2"]
)
def test_two_ranks_get_the_results_of_one(folder, tmp_path, name):
    expected = evaluate(config_of(folder, tmp_path / "one"))
    remove_parallel_groups()
    config = dataclasses.replace(config_of(folder, tmp_path / "two"), parallel=LAYOUTS[name])
    assert run_on_ranks(evaluate_on_rank, 2, config) == [expected, expected]
    keys = [(line["task"], line["doc_id"], line["repeat"]) for line in lines_below(tmp_path / "two")]
    assert len(keys) == len(set(keys)) == 2 * NUM_DOCUMENTS * NUM_RESPONSES, "each response is written once"


def test_two_jobs_with_a_chunk_each_get_the_results_of_one(folder, tmp_path):
    expected = evaluate(config_of(folder, tmp_path / "one"))
    assert evaluate(config_of(folder, tmp_path / "two", num_chunks=2, chunk=1)) is None, "half is missing"
    assert len(lines_below(tmp_path / "two")) == NUM_DOCUMENTS * NUM_RESPONSES
    assert evaluate(config_of(folder, tmp_path / "two", num_chunks=2, chunk=0)) == expected
    assert evaluate(config_of(folder, tmp_path / "two")) == expected, "nor does it matter who merges"


def test_a_sweep_scores_other_settings_with_the_model_that_is_there(folder, tmp_path):
    from megatron_opdlm.evaluation.harness import TaskEvaluation

    config = config_of(folder, tmp_path / "sweep")
    evaluation = TaskEvaluation(config)
    rollouts = [dataclasses.replace(config.rollout, block_size=8, denoising_steps_per_block=8), config.rollout]
    points = [evaluation.score(rollout) for rollout in rollouts]
    remove_parallel_groups()
    for point, rollout in zip(points, rollouts, strict=True):
        alone = dataclasses.replace(config_of(folder, tmp_path / f"block {rollout.block_size}"), rollout=rollout)
        took = evaluate(alone)["tasks"]["sums"]["responses"]
        remove_parallel_groups()
        assert point["sums"]["tokens_per_step"] == took["tokens_per_step"]
        assert point["sums"]["response_length"] == took["length"]
    assert points[0]["sums"]["tokens_per_step"] != points[1]["sums"]["tokens_per_step"]


def test_a_text_that_ends_a_response_is_not_in_it(folder, tmp_path):
    evaluate(config_of(folder, tmp_path, num_responses=8))
    lines = [json.loads(line) for line in (tmp_path / "responses" / "sums.jsonl").read_text().splitlines()]
    stopped = [line for line in lines if line["stop_reason"] == "stop"]
    assert stopped and all(line["response"].endswith("9") for line in stopped), "one token: decoding ends there"
    assert any("+s" in line["response"] for line in lines), "two tokens: cut off afterwards"
    assert all("9" not in line["scored_text"] and "+s" not in line["scored_text"] for line in lines)


def test_a_prompt_that_is_too_long_gets_no_response_and_is_counted(folder, tmp_path):
    config = config_of(folder, tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_prompt_tokens=24))
    took = evaluate(config)["tasks"]["sums"]["responses"]
    assert took["num_prompts_too_long"] > 0
    assert took["num_prompts_too_long"] < NUM_DOCUMENTS * NUM_RESPONSES
