"""Scoring a model on tasks of lm-evaluation-harness: resumable, shared out over ranks and jobs.

    evaluation = TaskEvaluation(config)             # opens the model, loads the tasks; refuses what does not fit
    evaluation.decode()                             # all ranks; responses are on disk as they come
    results = evaluation.results()                  # rank 0 alone; None while other jobs have not done their part
    evaluation.score(rollout)                       # both, with other decoding settings, for a sweep

Whatever decides a response is part of its fingerprint, and a response on disk with the fingerprint that is wanted is
not decoded again. So an evaluation that was killed goes on with the same command, jobs that each decode a chunk of
every task's documents meet in one folder, and the scores follow from the responses in it alone.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_opdlm.config.schema import Config, RolloutConfig
from megatron_opdlm.evaluation.answering import Answerer
from megatron_opdlm.evaluation.benchmarks import runs_code
from megatron_opdlm.evaluation.evaluated_model import autoregressive, open_evaluated_model
from megatron_opdlm.evaluation.fingerprint import text_fingerprint
from megatron_opdlm.evaluation.lm_eval_tasks import build_instances, load_tasks, repeats_of, response_requests
from megatron_opdlm.evaluation.requests import ROLLOUT_FIELDS, Key, ResponseRequest
from megatron_opdlm.evaluation.responses import Response, ResponseStore, file_name
from megatron_opdlm.evaluation.results import headline, write_atomically
from megatron_opdlm.evaluation.sandbox import check_isolation
from megatron_opdlm.evaluation.task_scores import efficiency, score_task
from megatron_opdlm.parallel.initialize import initialize

logger = logging.getLogger(__name__)


class TaskEvaluation:
    """The tasks of `evaluation.tasks`, and the model of `evaluation.role`. All ranks must make one.

    ValueError for a task or a model that does not fit, before any decoding.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.evaluation = config, config.evaluation
        self.opened = open_evaluated_model(config)
        self.loaded = load_tasks(config)
        self.instances = {
            name: build_instances(task, self.opened.tokenizer, config) for name, task in self.loaded.tasks.items()
        }
        self.requests = {
            name: response_requests(self.instances[name], config, repeats_of(task, config))
            for name, task in self.loaded.tasks.items()
        }
        if any(map(runs_code, self.loaded.tasks)):
            check_isolation(self.evaluation.sandbox)
        self.folder = output_folder(config)
        self._fingerprint, self._model = self.opened.fingerprint(), None
        self.groups = initialize(config.parallel, config.training.seed)

    def score(self, rollout: RolloutConfig) -> dict[str, dict[str, float]]:
        """The headline score of each task under other decoding settings; the model is built once.

        All ranks must call it and get the same. What a response is asked for (temperature, length) stays the tasks'.
        """
        self.decode(rollout)
        points = [None]
        if dist.get_rank() == 0:
            results = self.results(rollout)
            points = [None if results is None else {name: _point(row) for name, row in results["tasks"].items()}]
        dist.broadcast_object_list(points, src=0)
        assert points[0] is not None, "a sweep is not shared out over jobs"
        return points[0]

    def decode(self, rollout: RolloutConfig | None = None) -> None:
        """Decodes what this job has to do and is not on disk, by `config.rollout` unless told otherwise.

        All ranks must call it.
        """
        rollout = self._decoded_by(rollout)
        writer = f"chunk-{self.evaluation.chunk}-of-{self.evaluation.num_chunks}-rank-{dist.get_rank()}"
        with ResponseStore(self.folder / "responses", writer) as store:
            missing = self._missing(store, rollout)
            if not missing:
                return  # without reading any weights
            self._model = self._model or self.opened.load(self.groups)
            answerer = Answerer(self._model, rollout, show_progress=self._shows_progress())
            for benchmark, requests in self._by_benchmark(missing).items():
                logger.info("%s: %d responses to decode", benchmark, len(requests))
                answerer.respond(requests, store.append)

    def results(self, rollout: RolloutConfig | None = None) -> dict[str, Any] | None:
        """The scores of all tasks, and what they hold for; writes what each response got. On one rank.

        None if responses are missing, which other jobs have to decode.
        """
        rollout = self._decoded_by(rollout)
        responses = ResponseStore(self.folder / "responses", "").read(self._fingerprints(self._all(), rollout))
        num_missing = sum(map(len, self.requests.values())) - len(responses)
        if num_missing:
            logger.warning("%d responses are still to be decoded, by other chunks", num_missing)
            return None
        tasks = {}
        for name, task in self.loaded.tasks.items():
            scored = score_task(task, self.instances[name], responses, self.config)
            lines = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in scored.lines)
            write_atomically(self.folder / "responses" / f"{file_name(name)}.jsonl", lines)
            tasks[name] = scored.summary | {"decoding": _decoding(rollout, self.requests[name])}
        return {
            "model": {"role": self.evaluation.role, "folder": self.opened.folder, "fingerprint": self._fingerprint},
            "enable_thinking": self.config.data.enable_thinking,
            "tasks": tasks,
            "groups": self._groups(tasks, responses),
            "seconds": self._seconds(responses),
        }

    def subject(self) -> dict[str, Any]:
        """Who is scored, and on what: what a sweep's points have in common besides the settings of `rollout`."""
        tasks = {}
        for name, requests in self.requests.items():
            asked = _decoding(RolloutConfig(), requests)
            prompts = text_fingerprint(" ".join(request.fingerprint("", RolloutConfig()) for request in requests))
            tasks[name] = (
                f"{len(requests)} responses at temperature {asked['temperature']}, at most {asked['max_new_tokens']} "
                f"tokens ({prompts})"
            )
        return {"student": f"{self.opened.folder} ({self._fingerprint})", "tasks": tasks}

    def _all(self) -> list[ResponseRequest]:
        return [request for requests in self.requests.values() for request in requests]

    def _decoded_by(self, rollout: RolloutConfig | None) -> RolloutConfig:
        is_teacher = self.evaluation.role == "teacher"
        return self.opened.rollout if rollout is None else autoregressive(rollout) if is_teacher else rollout

    def _shows_progress(self) -> bool:
        return self.config.logging.progress_bar and dist.get_rank() == 0

    def _fingerprints(self, requests: list[ResponseRequest], rollout: RolloutConfig) -> dict[Key, str]:
        return {request.key: request.fingerprint(self._fingerprint, rollout) for request in requests}

    def _missing(self, store: ResponseStore, rollout: RolloutConfig) -> list[ResponseRequest]:
        """What rank 0 does not find on disk of this job's part; the same on all ranks."""
        mine = [request for request in self._all() if self._is_mine(request)]
        missing = [None]
        if dist.get_rank() == 0:
            found = store.read(self._fingerprints(mine, rollout))
            missing = [[place for place, request in enumerate(mine) if request.key not in found]]
            logger.info("%d of %d responses are there already", len(found), len(mine))
        dist.broadcast_object_list(missing, src=0)
        return [mine[place] for place in missing[0]]

    def _is_mine(self, request: ResponseRequest) -> bool:
        return request.doc_id % self.evaluation.num_chunks == self.evaluation.chunk

    def _by_benchmark(self, requests: list[ResponseRequest]) -> dict[str, list[ResponseRequest]]:
        """What is decoded together: the tasks of a group that has one score, and any other task by itself."""
        parts = defaultdict(list)
        for request in requests:
            parts[self.loaded.benchmark_of(request.task)].append(request)
        return parts

    def _groups(self, tasks: dict[str, Any], responses: dict[Key, Response]) -> dict[str, Any]:
        """The scores that the harness makes of a group's tasks."""
        metrics = {name: _harness_metrics(summary) for name, summary in tasks.items()}
        groups = {}
        for name, group in self.loaded.groups.items():
            members = {task.task_name for task in group.get_all_tasks()}
            scores = {
                key: {"mean": float(value), "stderr": _number(total.get(key.replace(",", "_stderr,")))}
                for total in [group.aggregate(metrics)]
                for key, value in total.items()
                if "," in key and "_stderr," not in key
            }
            if scores:
                used = [response for key, response in responses.items() if key[0] in members]
                groups[name] = {"tasks": sorted(members), "scores": scores, "responses": efficiency(used)}
        return groups

    def _seconds(self, responses: dict[Key, Response]) -> dict[str, float]:
        """Per benchmark, of all calls of the engine that took part: each to its last response that counts."""
        longest: dict[str, dict[int, float]] = defaultdict(dict)
        for response in responses.values():
            calls = longest[self.loaded.benchmark_of(response.task)]
            calls[response.call] = max(calls.get(response.call, 0.0), response.seconds)
        return {name: round(sum(calls.values()), 3) for name, calls in longest.items()}


def _decoding(rollout: RolloutConfig, requests: list[ResponseRequest]) -> dict[str, Any]:
    """The settings that a score holds for; a list where a task's documents differ in one."""
    asked = {}
    for name in ("temperature", "top_k", "top_p", "max_new_tokens"):
        values = sorted({getattr(request.settings, name) for request in requests})
        asked[name] = values[0] if len(values) == 1 else values
    return {name: getattr(rollout, name) for name in ROLLOUT_FIELDS} | asked


def _point(summary: dict[str, Any]) -> dict[str, float]:
    """Of a task's results what a sweep shows."""
    scores, took = summary["scores"][headline(summary["scores"])], summary["responses"]
    point = {"accuracy": scores["mean"], "tokens_per_step": took["tokens_per_step"], "response_length": took["length"]}
    if scores.get("stderr") is not None:
        point["standard_error"] = scores["stderr"]
    return point | {"end_token_fraction": took["end_token_rate"]}


def output_folder(config: Config) -> Path:
    """`evaluation.output`, or its place in the run directory."""
    return Path(config.evaluation.output or Path(config.logging.directory) / "evaluation")


def _harness_metrics(summary: dict[str, Any]) -> dict[str, Any]:
    """A task's scores under the harness's names."""
    metrics: dict[str, Any] = {"sample_len": summary["num_documents"]}
    for key, scores in summary["scores"].items():
        metrics[key] = scores["mean"]
        error = scores.get("stderr")
        metrics[key.replace(",", "_stderr,")] = "N/A" if error is None else error
    return metrics


def _number(value: Any) -> float | None:
    return None if value in (None, "N/A") else float(value)
