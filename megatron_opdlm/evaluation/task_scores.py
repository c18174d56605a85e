"""From the responses to a task to its scores, by the task's own filters, metrics and aggregation.

    scored = score_task(task, instances, responses, config)
    scored.summary["scores"]["exact_match,none"]      # {"mean": 0.7, "stderr": 0.05, "pass@2": 0.8, "majority": 0.7}
    scored.lines                                      # what each response got

Each response is scored by itself, as if the harness had asked for one, so that several of a document can be averaged,
drawn from (pass@k) and voted on. Names of scores are the harness's, metric and filter. The answers that are voted on
are what the task's filter leaves of a response, or, where its metrics have an `answer`, that.
"""

from __future__ import annotations

import copy
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any

from megatron_opdlm.config.schema import Config
from megatron_opdlm.evaluation.aggregation import are_right_or_wrong, ks, majority, mean_and_error, pass_at_k
from megatron_opdlm.evaluation.benchmarks import category_field, runs_code
from megatron_opdlm.evaluation.requests import Key
from megatron_opdlm.evaluation.responses import Response, scored_text
from megatron_opdlm.evaluation.sandbox import run_all

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

ANSWER = "answer"
"""A metric of this name is the answer that was found in a response, or None, and no number."""
NO_ANSWERS = (None, "", "[invalid]")
"""What filters leave of a response in which they find no answer."""

Values = list[list[Any]]
"""Per document, of each sample."""


@dataclass(frozen=True)
class ScoredTask:
    """A task's scores, and what they are made of."""

    summary: dict[str, Any]
    """For the results."""
    lines: list[dict[str, Any]]
    """One per response: the document, what was asked, the text, its scores."""


def score_task(task: Task, instances: list[Instance], responses: Mapping[Key, Response], config: Config) -> ScoredTask:
    """Scores all responses to a task, which must be there for all `instances`."""
    name, size = task.task_name, task.config.repeats or 1
    num_samples = config.evaluation.num_responses
    texts = [
        [_text(responses[name, instance.doc_id, repeat], instance, config) for repeat in range(num_samples * size)]
        for instance in instances
    ]
    samples = [[row[size * s : size * (s + 1)] for row in texts] for s in range(num_samples)]
    # Programs are waited for side by side. Other checks may need the main thread, for signals.
    judge = partial(run_all, num_processes=config.evaluation.code_processes) if runs_code(name) else map
    values, answers = _values(task, instances, samples, judge)
    aggregate = _aggregation(task)
    scores = {key: _scores(rows, answers.get(key), aggregate(key)) for key, rows in values.items()}
    used = [responses[name, instance.doc_id, repeat] for instance in instances for repeat in range(num_samples * size)]
    summary = {
        "version": str(task.VERSION),
        "num_documents": len(instances),
        "responses_per_document": num_samples * size,
        "scores": scores,
        "categories": _categories(name, instances, values, aggregate),
        "responses": efficiency(used),
    }
    return ScoredTask(summary, _lines(instances, texts, values, responses, size))


def efficiency(responses: Sequence[Response]) -> dict[str, float]:
    """What decoding took; lengths are in tokens, end tokens included."""
    num_decoded = sum(response.num_steps > 0 for response in responses)
    num_tokens = sum(response.num_tokens for response in responses)
    num_steps = sum(response.num_steps for response in responses)
    return {
        "length": num_tokens / len(responses),
        "tokens_per_step": num_tokens / max(num_steps, 1),
        "forwards": num_steps / max(num_decoded, 1),
        "end_token_rate": sum(response.stop_reason == "end_token" for response in responses) / len(responses),
        "stop_rate": sum(response.stop_reason == "stop" for response in responses) / len(responses),
        "num_prompts_too_long": sum(response.stop_reason == "prompt_too_long" for response in responses),
    }


def _text(response: Response, instance: Instance, config: Config) -> str:
    until = instance.args[1].get("until") or []
    return scored_text(response.text, [until] if isinstance(until, str) else until, config.data.enable_thinking)


def _values(
    task: Task, instances: list[Instance], samples: list, judge: Callable
) -> tuple[dict[str, Values], dict[str, Values]]:
    """Score and answer of every sample, by the names of the scores."""
    values, answers = defaultdict(list), defaultdict(list)
    for texts in samples:
        for filtered_by, place, left, metrics in _harness_scores(task, instances, texts, judge):
            found = metrics.pop(ANSWER) if ANSWER in metrics else left
            has_answers = found is not left or (len(texts[place]) == 1 and left != texts[place][0])
            for metric, value in metrics.items():
                key = f"{metric},{filtered_by}"
                _put(values[key], place, value)
                _put(answers[key], place, (_as_vote(found), has_answers))
    voted = {
        key: [[vote for vote, _ in row] for row in rows]
        for key, rows in answers.items()
        if any(has_answers for row in rows for _, has_answers in row)
    }
    return dict(values), voted


def _harness_scores(task: Task, instances: list[Instance], texts: list[list[str]], judge: Callable):
    """(filter, place of the document, what the filter left, metrics) of each document.

    `judge` is `map` or does the same several at a time.
    """
    filled = [copy.copy(instance) for instance in instances]
    for instance, row in zip(filled, texts, strict=True):
        instance.resps, instance.filtered_resps = list(row), {}
    for ensemble in task._filters:
        ensemble.apply(filled)
        lefts = [instance.filtered_resps[ensemble.name] for instance in filled]
        metrics = judge(
            lambda pair: task.process_results(pair[0].doc, [pair[1]]), list(zip(filled, lefts, strict=True))
        )
        for place, (left, found) in enumerate(zip(lefts, metrics, strict=True)):
            yield ensemble.name, place, left, dict(found)


def _put(rows: list[list], place: int, value: Any) -> None:
    while len(rows) <= place:
        rows.append([])
    rows[place].append(value)


def _as_vote(found: Any) -> str | None:
    found = found[0] if isinstance(found, list) and found else found
    return None if found in NO_ANSWERS else str(found)


def _aggregation(task: Task) -> Callable[[str], Callable[[list], float]]:
    """Of a score's name, the task's aggregation of its metric over documents; the mean where it names none."""
    known = task.aggregation()
    return lambda key: known.get(key.rpartition(",")[0], statistics.fmean)


def _scores(rows: Values, answers: Values | None, aggregate: Callable[[list], float]) -> dict[str, float | None]:
    has_score = [bool(row) for row in rows]  # a task may leave a metric out for a document
    rows = list(compress(rows, has_score))
    scores = {"mean": _mean_over_samples(rows, aggregate)}
    if not all(isinstance(value, int | float) for row in rows for value in row):
        return scores
    rows = [[float(value) for value in row] for row in rows]
    scores["stderr"] = mean_and_error(rows)[1]
    if are_right_or_wrong(rows) and len(rows[0]) > 1:
        scores |= {f"pass@{k}": pass_at_k(rows, k) for k in ks(len(rows[0]))}
        if answers is not None:
            scores["majority"] = majority(list(compress(answers, has_score)), rows)
    return scores


def _mean_over_samples(rows: Values, aggregate: Callable[[list], float]) -> float:
    num_samples = max(map(len, rows))
    return statistics.fmean(float(aggregate([row[s] for row in rows if len(row) > s])) for s in range(num_samples))


def _categories(
    task: str, instances: list[Instance], values: dict[str, Values], aggregate: Callable[[str], Callable]
) -> dict[str, dict[str, float]]:
    """The mean scores of each category that the documents name."""
    field, places = category_field(task), defaultdict(list)
    for place, instance in enumerate(instances):
        category = instance.doc.get(field)
        if isinstance(category, str):
            places[category].append(place)
    return {
        category: {"num_documents": len(chosen)}
        | {
            key: _mean_over_samples([rows[place] for place in chosen if place < len(rows)], aggregate(key))
            for key, rows in values.items()
            if any(place < len(rows) for place in chosen)
        }
        for category, chosen in sorted(places.items())
    }


def _lines(
    instances: list[Instance],
    texts: list[list[str]],
    values: dict[str, Values],
    responses: Mapping[Key, Response],
    size: int,
) -> list[dict[str, Any]]:
    lines = []
    for place, instance in enumerate(instances):
        for repeat, text in enumerate(texts[place]):
            response = responses[instance.task_name, instance.doc_id, repeat]
            scores = {key: rows[place][repeat // size] for key, rows in values.items() if place < len(rows)}
            lines.append(
                {
                    "doc_id": instance.doc_id,
                    "repeat": repeat,
                    "prompt": instance.args[0],
                    "response": response.text,
                    "scored_text": text,
                    "scores": scores,
                    "num_tokens": response.num_tokens,
                    "num_steps": response.num_steps,
                    "stop_reason": response.stop_reason,
                }
            )
    return lines
