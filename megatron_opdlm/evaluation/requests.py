"""What a model is asked for: a prompt, and how the response to it is decoded.

    settings = decoding_settings({"until": ["\\n\\n"], "do_sample": False, "max_gen_toks": 64}, config, "task gsm8k")
    request = ResponseRequest(task="gsm8k", doc_id=3, repeat=0, prompt="...", settings=settings)
    request.fingerprint(model_fingerprint, rollout)        # of everything that decides the response

The names in a request for generation are those of lm-evaluation-harness; what a block-diffusion model cannot do is
refused, not left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_opdlm.config.schema import Config, RolloutConfig
from megatron_opdlm.evaluation.fingerprint import text_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Key = tuple[str, int, int]
"""Task, document, repeat."""

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names for the longest response; the first that is given counts."""
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0.0}
"""What a request may say because it asks for nothing."""
ROLLOUT_FIELDS = (
    "block_size",
    "denoising_steps_per_block",
    "remasking_strategy",
    "dynamic_threshold",
    "entropy_bound",
    "logit_shift",
    "stop_token_ids",
)
"""Settings of `rollout` that decide what is decoded, apart from those of `DecodingSettings`."""


@dataclass(frozen=True)
class DecodingSettings:
    """How a response is decoded, as far as a request can say."""

    until: tuple[str, ...]
    """Texts that end the response; it has none of them."""
    max_new_tokens: int
    temperature: float
    """0 takes the most likely token."""
    top_k: int
    top_p: float


@dataclass(frozen=True)
class ResponseRequest:
    """One response that is wanted."""

    task: str
    doc_id: int
    """Number of the document among those of the task."""
    repeat: int
    """Which response to that document."""
    prompt: str
    """Up to where the response starts, special tokens included."""
    settings: DecodingSettings

    @property
    def key(self) -> Key:
        """What tells it from the other requests of an evaluation."""
        return self.task, self.doc_id, self.repeat

    @property
    def prompt_id(self) -> int:
        """A number for its random numbers: the same in whatever order and company it is decoded."""
        digest = hashlib.blake2b(f"{self.task}/{self.doc_id}".encode(), digest_size=6).digest()
        return int.from_bytes(digest, "big")

    def fingerprint(self, model: str, rollout: RolloutConfig) -> str:
        """Of all that decides the response; `model` is the fingerprint of the model."""
        decoding = {name: getattr(rollout, name) for name in ROLLOUT_FIELDS}
        content = [model, self.prompt, dataclasses.asdict(self.settings), decoding]
        return text_fingerprint(json.dumps(content))


def decoding_settings(generation: dict[str, Any], config: Config, place: str) -> DecodingSettings:
    """What a request's `generation_kwargs` come to under `evaluation` and `rollout`.

    `place` says in a message whose they are. ValueError for what cannot be honoured.
    """
    asked = dict(generation)
    until = asked.pop("until", None) or []
    limits = [asked.pop(name) for name in LIMITS if name in asked]
    temperature = _temperature(asked.pop("do_sample", None), asked.pop("temperature", None))
    top_k, top_p = asked.pop("top_k", config.rollout.top_k), asked.pop("top_p", config.rollout.top_p)
    for name, value in asked.items():
        if name not in NEUTRAL or value != NEUTRAL[name]:
            raise ValueError(f"{place} asks for {name} ({value}), which block-diffusion decoding does not have")
    evaluation = config.evaluation
    return DecodingSettings(
        until=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        max_new_tokens=evaluation.max_new_tokens or int(next(iter(limits), config.rollout.max_new_tokens)),
        temperature=temperature if evaluation.temperature is None else evaluation.temperature,
        top_k=int(top_k),
        top_p=float(top_p),
    )


def _temperature(do_sample: bool | None, temperature: float | None) -> float:
    """Greedy unless sampling is asked for, by `do_sample` or by a temperature."""
    if do_sample is None:
        return float(temperature or 0.0)
    return float(1.0 if temperature is None else temperature) if do_sample else 0.0


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = True,
    enable_thinking: bool = False,
) -> str:
    """The messages in the tokenizer's chat template, up to where the response starts.

    Without `add_generation_prompt` the last message is the beginning of the response, which goes on behind it.
    ValueError if there is no template, or it refuses the messages.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ValueError("data.apply_chat_template (true) must be false: the model's tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            enable_thinking=enable_thinking,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the messages of a prompt: {error}") from error
