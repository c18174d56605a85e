"""The model of a recipe as a model of lm-evaluation-harness, under the name `megatron_opdlm`.

    model = MegatronOpdlm(config="recipe.yaml", **{"student.hf": "student", "data.enable_thinking": True})
    lm_eval.simple_evaluate(model, tasks=["gsm8k"], apply_chat_template=True)

On the command line of the harness: `megatron_opdlm.evaluation.lm_eval`. Under torchrun every rank makes the model and
gets all requests; the engine shares them out, and every rank gets all responses. Each request's own generation settings
count, and `rollout` for the rest. `megatron_opdlm.evaluate` can do more: resume, share work between jobs, score several
responses.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from megatron_opdlm.config.check import check_layout
from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import Config
from megatron_opdlm.evaluation.answering import Answerer
from megatron_opdlm.evaluation.evaluated_model import open_evaluated_model
from megatron_opdlm.evaluation.requests import ResponseRequest, chat_prompt, decoding_settings
from megatron_opdlm.evaluation.responses import scored_text
from megatron_opdlm.evaluation.sandbox import check_isolation
from megatron_opdlm.parallel.initialize import initialize, rank, world_size

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NO_LIKELIHOODS = (
    "megatron_opdlm answers by generating text and has no likelihoods: a block-diffusion model gives none in one pass. "
    "Name tasks with `output_type: generate_until`, such as those of megatron_opdlm/evaluation/tasks"
)


@register_model("megatron_opdlm")
class MegatronOpdlm(LM):
    """Student or teacher, by `evaluation.role`. All ranks must make one.

    Args:
        config: a recipe, or a Config that has been checked.
        batch_size, max_batch_size, device: what the harness gives every model; `rollout.batch_size` and the ranks
            decide instead.
        settings: settings by their dotted names, on top of the recipe.
    """

    def __init__(
        self,
        config: str | Config | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        config = config if isinstance(config, Config) else _load(config, settings)
        if config.evaluation.sandbox == "strict":
            check_isolation("strict")  # which tasks will be asked is not known yet
        self.config, self.opened = config, open_evaluated_model(config)
        self.tokenizer = self.opened.tokenizer
        groups = initialize(config.parallel, config.training.seed)
        shows_progress = config.logging.progress_bar and rank() == 0
        self.answerer = Answerer(self.opened.load(groups), show_progress=shows_progress)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A text for each request, in their order. All ranks must call it with the same requests.

        A document that comes several times gets as many responses, each with random numbers of its own.
        """
        wanted, repeats = [], Counter()
        for instance in requests:
            document = instance.task_name or "task", instance.doc_id or 0
            wanted.append(self._request(instance, *document, repeats[document]))
            repeats[document] += 1
        responses = self.answerer.respond(wanted)
        enable_thinking = self.config.data.enable_thinking
        texts = [scored_text(responses[w.key].text, w.settings.until, enable_thinking) for w in wanted]
        for instance, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", instance.args, text)
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused."""
        raise ValueError(NO_LIKELIHOODS)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refused."""
        raise ValueError(NO_LIKELIHOODS)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As in `chat_prompt`, thinking or not as `data.enable_thinking` says."""
        return chat_prompt(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=self.config.data.enable_thinking,
        )

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's cache of prompts, which thinking changes."""
        thinking = "-thinking" if self.config.data.enable_thinking else ""
        return self.opened.folder.replace("/", "__") + thinking

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, for the record; ValueError for a template by another name."""
        if isinstance(chat_template, str):
            raise ValueError(f"apply_chat_template ({chat_template}) must not name a template: a tokenizer has one")
        return self.tokenizer.chat_template if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its scores: which model, and how it decodes."""
        rollout = self.opened.rollout
        return {
            "role": self.config.evaluation.role,
            "folder": self.opened.folder,
            "fingerprint": self.answerer.fingerprint,
            "block_size": rollout.block_size,
            "denoising_steps_per_block": rollout.denoising_steps_per_block,
            "remasking_strategy": rollout.remasking_strategy,
            "dynamic_threshold": rollout.dynamic_threshold,
            "enable_thinking": self.config.data.enable_thinking,
        }

    def _request(self, instance: Instance, task: str, doc_id: int, repeat: int) -> ResponseRequest:
        prompt, generation = instance.args[:2]
        settings = decoding_settings(generation, self.config, f"task {task}")
        return ResponseRequest(task, doc_id, repeat, prompt, settings)


def _load(recipe: str | None, settings: dict[str, Any]) -> Config:
    arguments = [] if recipe is None else [f"--config={recipe}"]
    arguments += [f"--{name}={_spelt(value)}" for name, value in settings.items()]
    config = load_config(arguments, required=("evaluation.role",))
    check_layout(config.parallel, world_size())
    return config


def _spelt(value: Any) -> str:
    """As on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
