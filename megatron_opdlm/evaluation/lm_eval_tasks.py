"""Tasks of lm-evaluation-harness: finding them, and the requests that their documents make.

    loaded = load_tasks(config)                                      # tasks, and the groups that were named
    instances = build_instances(loaded.tasks["gsm8k"], tokenizer, config)
    requests = response_requests(instances, config, repeats=1)

This file is the one that needs the package to be installed; what wants a task imports it from here.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import importlib.util
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from megatron_opdlm.config.schema import Config, EvaluationConfig
from megatron_opdlm.evaluation.benchmarks import TASKS_FOLDER
from megatron_opdlm.evaluation.requests import ResponseRequest, chat_prompt, decoding_settings

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.tasks.manager import TaskDict, TaskManager
    from transformers import PreTrainedTokenizerBase

TASK_SEED, FEWSHOT_SEED = 0, 1234
"""The harness's own: of tasks that shuffle their choices, and of the examples in front of a question."""


@dataclass(frozen=True)
class LoadedTasks:
    """What `evaluation.tasks` names."""

    tasks: dict[str, Task]
    groups: dict[str, Group]

    def benchmark_of(self, task: str) -> str:
        """The outermost group that has a score made of this task's; the task where there is none."""
        holders = [
            group
            for group in self.groups.values()
            if group.has_aggregation and task in {member.task_name for member in group.get_all_tasks()}
        ]
        return max(holders, key=lambda group: len(group.get_all_tasks())).name if holders else task


def require_lm_eval() -> None:
    """ValueError that says how to get lm-evaluation-harness, where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('evaluation.tasks needs lm-evaluation-harness: pip install "megatron-opdlm[eval]"')


def load_tasks(config: Config) -> LoadedTasks:
    """The tasks that `evaluation.tasks` names, with their documents.

    ValueError for an unknown name, a data set that is not there, and a task that is not scored by generated text.
    """
    require_lm_eval()
    random.seed(TASK_SEED)
    tasks, groups = {}, {}
    for name in config.evaluation.tasks:
        loaded = _load(name, config.evaluation)
        tasks |= loaded["tasks"]
        groups |= loaded["groups"]
    for name, task in tasks.items():
        _check_task(name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return LoadedTasks(tasks, groups)


def build_instances(task: Task, tokenizer: PreTrainedTokenizerBase, config: Config) -> list[Instance]:
    """The harness's request of each document, at most `evaluation.max_tasks`.

    All documents are gone through in their order whoever decodes them: examples in front of a question are drawn in it.
    """
    applies = config.data.apply_chat_template
    template = partial(chat_prompt, tokenizer, enable_thinking=config.data.enable_thinking)
    task.build_all_requests(
        limit=config.evaluation.max_tasks,
        system_instruction=config.evaluation.system_message,
        apply_chat_template=applies,
        fewshot_as_multiturn=applies,
        chat_template=template if applies else None,
    )
    return task.instances


def repeats_of(task: Task, config: Config) -> int:
    """Responses to each document: `evaluation.num_responses` times as many as the task itself makes one score of."""
    return config.evaluation.num_responses * (task.config.repeats or 1)


def response_requests(instances: list[Instance], config: Config, repeats: int) -> list[ResponseRequest]:
    """Ours for the harness's, each document's repeats side by side."""
    requests = []
    for instance in instances:
        prompt, generation = instance.args[:2]
        settings = decoding_settings(generation, config, f"task {instance.task_name}")
        requests += [
            ResponseRequest(instance.task_name, instance.doc_id, repeat, prompt, settings) for repeat in range(repeats)
        ]
    return requests


def _load(name: str, evaluation: EvaluationConfig) -> TaskDict:
    """The tasks and groups of one name or pattern."""
    folders = (str(TASKS_FOLDER), *evaluation.include_path)
    # Going through the harness's thousands of definitions takes ten seconds, which a task of these folders can do
    # without, unless it is a group with members there.
    ours = _task_manager(folders, evaluation.data_dir, include_defaults=False)
    if not glob.has_magic(name) and (names := ours.match_tasks([name])):
        with contextlib.suppress(KeyError), _data_set_errors(name):
            return ours.load(names)
    everything = _task_manager(folders, evaluation.data_dir, include_defaults=True)
    names = everything.match_tasks([name])
    if not names:
        nearest = difflib.get_close_matches(name, everything.all_tasks, n=1, cutoff=0.0)
        raise ValueError(f"evaluation.tasks ({name}) is not a task; the nearest is {', '.join(nearest)}")
    with _data_set_errors(name):
        return everything.load(names)


@functools.cache
def _task_manager(folders: tuple[str, ...], data_dir: str | None, *, include_defaults: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    metadata = {"data_dir": data_dir} if data_dir else {}
    return TaskManager(include_path=list(folders), include_defaults=include_defaults, metadata=metadata)


def _check_task(name: str, task: Task) -> None:
    if task.OUTPUT_TYPE != "generate_until":
        raise ValueError(
            f"evaluation.tasks ({name}) is scored by {task.OUTPUT_TYPE}, which a block-diffusion model does not give "
            "in one pass; name a task with `output_type: generate_until`"
        )
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(
            f"evaluation.tasks ({name}) runs what the model writes without a sandbox; name a task of "
            "megatron_opdlm/evaluation/tasks, which have one"
        )


@contextlib.contextmanager
def _data_set_errors(name: str) -> Iterator[None]:
    """Turns what `datasets` says of a data set that it cannot find into one line."""
    from datasets.exceptions import DatasetNotFoundError

    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        yield
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"evaluation.tasks ({name}): its data set is not there: {error}. With a network, "
            "`hf download --repo-type dataset NAME` gets it by the name that is missing"
        ) from error
