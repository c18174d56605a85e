"""Scoring a model on tasks of lm-evaluation-harness: resumable, shared out over ranks and jobs.

    evaluation = TaskEvaluation(config)             # opens the model, loads the tasks; refuses what does not fit
    evaluation.decode()                             # all ranks; responses are on disk as they come
    results = evaluation.results()                  # rank 0 alone; None while other jobs have not done their part

Whatever decides a response is part of its fingerprint, and a response on disk with the fingerprint that is wanted is
not decoded again. So an evaluation that was killed goes on with the same command, jobs that each decode a chunk of
every task's documents meet in one folder, and the scores follow from the responses in it alone.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_opdlm.config.schema import Config
from megatron_opdlm.evaluation.answering import Answerer
from megatron_opdlm.evaluation.evaluated_model import open_evaluated_model
from megatron_opdlm.evaluation.lm_eval_tasks import build_instances, load_tasks, repeats_of, response_requests
from megatron_opdlm.evaluation.requests import ROLLOUT_FIELDS, Key, ResponseRequest
from megatron_opdlm.evaluation.responses import Response, ResponseStore, file_name
from megatron_opdlm.evaluation.results import write_atomically
from megatron_opdlm.evaluation.task_scores import efficiency, score_task
from megatron_opdlm.parallel.initialize import initialize

if TYPE_CHECKING:
    from megatron_opdlm.config.schema import RolloutConfig

logger = logging.getLogger(__name__)


class TaskEvaluation:
    """The tasks of `evaluation.tasks`, and the model of `evaluation.role`. All ranks must make one.

    `rollout` takes the place of `config.rollout`. ValueError for a task or a model that does not fit, before any
    decoding.
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
        self.folder = output_folder(config)
        self.answerer: Answerer | None = None
        self._model = self.opened.fingerprint()

    def decode(self) -> None:
        """Decodes what this job has to do and is not on disk. All ranks must call it."""
        groups = initialize(self.config.parallel, self.config.training.seed)
        writer = f"chunk-{self.evaluation.chunk}-of-{self.evaluation.num_chunks}-rank-{dist.get_rank()}"
        with ResponseStore(self.folder / "responses", writer) as store:
            missing = self._missing(store)
            if not missing:
                return
            # The weights are read only if there is something to decode.
            answerer = Answerer(self.opened.load(groups), show_progress=self.config.logging.progress_bar)
            for benchmark, requests in self._by_benchmark(missing).items():
                logger.info("%s: %d responses to decode", benchmark, len(requests))
                answerer.respond(requests, store.append)

    def results(self) -> dict[str, Any] | None:
        """The scores of all tasks, and what they hold for; writes what each response got. On one rank.

        None if responses are missing, which other jobs have to decode.
        """
        responses = ResponseStore(self.folder / "responses", "").read(self._fingerprints(self._all()))
        num_missing = sum(map(len, self.requests.values())) - len(responses)
        if num_missing:
            logger.warning("%d responses are still to be decoded, by other chunks", num_missing)
            return None
        tasks = {}
        for name, task in self.loaded.tasks.items():
            scored = score_task(task, self.instances[name], responses, self.config)
            lines = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in scored.lines)
            write_atomically(self.folder / "responses" / f"{file_name(name)}.jsonl", lines)
            tasks[name] = scored.summary | {"decoding": self._decoding(self.requests[name])}
        return {
            "model": {"role": self.evaluation.role, "folder": self.opened.folder, "fingerprint": self._model},
            "enable_thinking": self.config.data.enable_thinking,
            "tasks": tasks,
            "groups": self._groups(tasks, responses),
            "seconds": self._seconds(responses),
        }

    def _all(self) -> list[ResponseRequest]:
        return [request for requests in self.requests.values() for request in requests]

    def _fingerprints(self, requests: list[ResponseRequest]) -> dict[Key, str]:
        return {request.key: request.fingerprint(self._model, self.opened.rollout) for request in requests}

    def _missing(self, store: ResponseStore) -> list[ResponseRequest]:
        """What rank 0 does not find on disk of this job's part; the same on all ranks."""
        mine = [request for request in self._all() if self._is_mine(request)]
        missing = [None]
        if dist.get_rank() == 0:
            found = store.read(self._fingerprints(mine))
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

    def _decoding(self, requests: list[ResponseRequest]) -> dict[str, Any]:
        """The settings that a score holds for; a list where a task's documents differ in one."""
        rollout: RolloutConfig = self.opened.rollout
        asked = {}
        for name in ("temperature", "top_k", "top_p", "max_new_tokens"):
            values = sorted({getattr(request.settings, name) for request in requests})
            asked[name] = values[0] if len(values) == 1 else values
        return {name: getattr(rollout, name) for name in ROLLOUT_FIELDS} | asked

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
