"""Decoding the responses to requests, on all data-parallel ranks together.

    answerer = Answerer(opened.load(groups), rollout=None)
    responses = answerer.respond(requests, on_response=store.append)        # {key: Response}, on every rank

The engine shares the requests out, and refills places as sequences end. Requests that differ in how tokens are filtered
or in the tokens that end them are decoded in turn, all others together.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Callable

import torch.distributed as dist

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.evaluation.evaluated_model import EvaluatedModel
from megatron_opdlm.evaluation.requests import Key, ResponseRequest
from megatron_opdlm.evaluation.responses import Response
from megatron_opdlm.rollout.engine import RolloutTask

logger = logging.getLogger(__name__)

OnResponse = Callable[[Response], None]


class Answerer:
    """Responds to requests with one model under one set of `rollout` settings."""

    def __init__(
        self, model: EvaluatedModel, rollout: RolloutConfig | None = None, show_progress: bool = False
    ) -> None:
        self.model, self.opened, self.show_progress = model, model.opened, show_progress
        self.rollout = rollout or model.opened.rollout
        self.fingerprint = model.opened.fingerprint()
        self._ends = set(model.opened.special.end_token_ids)

    def respond(self, requests: list[ResponseRequest], on_response: OnResponse | None = None) -> dict[Key, Response]:
        """A response to each request. All ranks must call it with the same requests and get the same.

        `on_response` is told of each as soon as it is there, on one of the ranks that decoded it.
        """
        call = [time.time_ns()]
        dist.broadcast_object_list(call, src=0)
        prompts = self._tokenize(requests)
        decoded = {}
        for (stops, top_k, top_p), places in self._alike(requests, prompts).items():
            rollout = dataclasses.replace(self.rollout, top_k=top_k, top_p=top_p)
            group = _Group(self, [requests[place] for place in places], call[0], stops, on_response)
            tasks = {place: _task(requests[place], prompts[place]) for place in places}
            decoded |= group.decode(rollout, list(tasks.values()))
        refused = [self._refused(r, call[0]) for r, ids in zip(requests, prompts, strict=True) if self._is_long(ids)]
        if refused:
            logger.warning(
                "%d prompts have more than data.max_prompt_tokens (%d) tokens and get no response",
                len(refused),
                self.opened.config.data.max_prompt_tokens,
            )
        if on_response is not None and dist.get_rank() == 0:
            for response in refused:
                on_response(response)
        return decoded | {response.key: response for response in refused}

    def _tokenize(self, requests: list[ResponseRequest]) -> list[tuple[int, ...]]:
        """Prompts bring their special tokens along."""
        if not requests:
            return []
        encoded = self.opened.tokenizer([request.prompt for request in requests], add_special_tokens=False)
        return [tuple(ids) for ids in encoded["input_ids"]]

    def _is_long(self, ids: tuple[int, ...]) -> bool:
        return len(ids) > self.opened.config.data.max_prompt_tokens

    def _alike(self, requests: list[ResponseRequest], prompts: list[tuple[int, ...]]) -> dict[tuple, list[int]]:
        """(tokens that end a response, top-k, top-p) -> the places of the requests that have them."""
        alike = defaultdict(list)
        for place, (request, ids) in enumerate(zip(requests, prompts, strict=True)):
            if not self._is_long(ids):
                settings = request.settings
                alike[self._stop_tokens(settings.until), settings.top_k, settings.top_p].append(place)
        return alike

    def _stop_tokens(self, until: tuple[str, ...]) -> tuple[int, ...]:
        """The texts that are one token: decoding can end with it. Any others are cut off afterwards.

        Thoughts may hold a text that ends the answer, but not a special token.
        """
        tokenizer, stops = self.opened.tokenizer, []
        for text in until:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            is_special = ids[0] in tokenizer.all_special_ids if ids else False
            if len(ids) == 1 and (is_special or self._ends_text(ids[0], text)):
                stops.append(ids[0])
        return tuple(sorted(set(stops) - self._ends))

    def _ends_text(self, token_id: int, text: str) -> bool:
        return not self.opened.config.data.enable_thinking and self.opened.tokenizer.decode([token_id]) == text

    def _refused(self, request: ResponseRequest, call: int) -> Response:
        fingerprint = request.fingerprint(self.fingerprint, self.rollout)
        return Response(*request.key, fingerprint, "", 0, 0, "prompt_too_long", call, 0.0)

    def response(self, request: ResponseRequest, trajectory: Trajectory, call: int) -> Response:
        """What the engine decoded, as it is kept."""
        ids = trajectory.response_ids.tolist()
        reason = trajectory.stop_reason
        if reason == "end_token":
            reason = "end_token" if ids[-1] in self._ends else "stop"
        return Response(
            *request.key,
            fingerprint=request.fingerprint(self.fingerprint, self.rollout),
            text=self.opened.tokenizer.decode(ids, skip_special_tokens=True),
            num_tokens=trajectory.response_length,
            num_steps=trajectory.num_steps,
            stop_reason=reason,
            call=call,
            seconds=round((time.time_ns() - call) / 1e9, 3),
        )


class _Group:
    """Requests that the engine can decode in one call."""

    def __init__(
        self,
        answerer: Answerer,
        requests: list[ResponseRequest],
        call: int,
        stops: tuple[int, ...],
        on_response: OnResponse | None,
    ) -> None:
        self.answerer, self.requests, self.call, self.stops = answerer, requests, call, stops
        groups = answerer.model.groups
        self.group = groups.dp
        is_first = groups.tp.rank() == 0 and groups.pp.rank() == 0
        self.on_response = on_response if is_first else None

    def decode(self, rollout: RolloutConfig, tasks: list[RolloutTask]) -> dict[Key, Response]:
        """All of them, on every rank."""
        engine = self.answerer.model.engine(rollout, self.stops, self.answerer.show_progress)
        mine = engine.generate_some(dict(enumerate(tasks)), step=0, on_finished=self._tell)
        own = [self._response(place, trajectory) for place, trajectory in mine.items()]
        gathered = [None] * self.group.size()
        dist.all_gather_object(gathered, own, group=self.group)
        return {response.key: response for part in gathered for response in part}

    def _tell(self, place: int, trajectory: Trajectory) -> None:
        if self.on_response is not None:
            self.on_response(self._response(place, trajectory))

    def _response(self, place: int, trajectory: Trajectory) -> Response:
        return self.answerer.response(self.requests[place], trajectory, self.call)


def _task(request: ResponseRequest, ids: tuple[int, ...]) -> RolloutTask:
    settings = request.settings
    return RolloutTask(
        Prompt(request.prompt_id, ids), settings.max_new_tokens, request.repeat, temperature=settings.temperature
    )
