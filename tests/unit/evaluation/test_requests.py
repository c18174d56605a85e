"""What the settings of a request for generation come to, and what a fingerprint is of."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megatron_opdlm.config.schema import Config, EvaluationConfig, RolloutConfig
from megatron_opdlm.evaluation.requests import DecodingSettings, ResponseRequest, chat_prompt, decoding_settings
from tests.tiny_qwen3 import make_tokenizer

CONFIG = Config(rollout=RolloutConfig(max_new_tokens=40, top_k=3, top_p=0.9, temperature=1.0))
SETTINGS = DecodingSettings(until=("\n",), max_new_tokens=8, temperature=0.0, top_k=0, top_p=1.0)
REQUEST = ResponseRequest(task="sums", doc_id=3, repeat=1, prompt="1+1=", settings=SETTINGS)


def test_a_request_decides_and_the_rollout_settings_fill_in():
    settings = decoding_settings({"until": "\n\n", "max_gen_toks": 8, "top_p": 0.5}, CONFIG, "")
    assert settings == DecodingSettings(until=("\n\n",), max_new_tokens=8, temperature=0.0, top_k=3, top_p=0.5)
    assert decoding_settings({}, CONFIG, "").max_new_tokens == 40


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"temperature": 0.7}, 0.7),
    ],
)
def test_nothing_is_sampled_unless_it_is_asked_for(asked, expected):
    assert decoding_settings(asked, CONFIG, "").temperature == expected


def test_the_settings_of_an_evaluation_go_before_those_of_a_task():
    config = dataclasses.replace(CONFIG, evaluation=EvaluationConfig(temperature=0.0, max_new_tokens=5))
    settings = decoding_settings({"do_sample": True, "temperature": 0.7, "max_gen_toks": 99}, config, "")
    assert (settings.temperature, settings.max_new_tokens) == (0.0, 5)


def test_what_block_diffusion_cannot_do_is_refused_and_what_asks_for_nothing_is_not():
    assert decoding_settings({"num_beams": 1}, CONFIG, "").temperature == 0.0
    message = "task sums asks for num_beams (4), which block-diffusion decoding does not have"
    with pytest.raises(ValueError, match=re.escape(message)):
        decoding_settings({"num_beams": 4}, CONFIG, "task sums")


@pytest.mark.parametrize(
    ("request_changes", "settings_changes", "rollout_changes", "model"),
    [
        ({"prompt": "1+2="}, {}, {}, "m"),
        ({}, {"temperature": 0.5}, {}, "m"),
        ({}, {"until": ()}, {}, "m"),
        ({}, {"max_new_tokens": 9}, {}, "m"),
        ({}, {"top_k": 1}, {}, "m"),
        ({}, {"top_p": 0.5}, {}, "m"),
        ({}, {}, {"block_size": 8}, "m"),
        ({}, {}, {"dynamic_threshold": 0.8}, "m"),
        ({}, {}, {"remasking_strategy": "sequential"}, "m"),
        ({}, {}, {}, "other weights"),
    ],
)
def test_whatever_decides_a_response_changes_its_fingerprint(request_changes, settings_changes, rollout_changes, model):
    settings = dataclasses.replace(SETTINGS, **settings_changes)
    changed = dataclasses.replace(REQUEST, settings=settings, **request_changes)
    rollout = RolloutConfig(**rollout_changes)
    assert changed.fingerprint(model, rollout) != REQUEST.fingerprint("m", RolloutConfig())


def test_what_does_not_decide_a_response_is_not_in_its_fingerprint():
    other = RolloutConfig(batch_size=7, temperature=0.3, max_new_tokens=1, cuda_graphs=False)
    assert REQUEST.fingerprint("m", other) == REQUEST.fingerprint("m", RolloutConfig())


def test_random_numbers_belong_to_a_document_whatever_its_place():
    again = dataclasses.replace(REQUEST, repeat=0, prompt="")
    assert again.prompt_id == REQUEST.prompt_id
    assert dataclasses.replace(REQUEST, doc_id=4).prompt_id != REQUEST.prompt_id


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.chat_template += "{% if enable_thinking %}<think>{% endif %}"
    return tokenizer


def test_think_mode_reaches_the_template(tokenizer):
    messages = [{"role": "user", "content": "1+1="}]
    without = "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert chat_prompt(tokenizer, messages) == without
    assert chat_prompt(tokenizer, messages, enable_thinking=True) == without + "<think>"


def test_a_system_message_comes_first_and_a_prefill_is_left_open(tokenizer):
    messages = [
        {"role": "system", "content": "add"},
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "it is "},
    ]
    text = chat_prompt(tokenizer, messages, add_generation_prompt=False)
    assert text == "<|im_start|>system\nadd<|im_end|>\n<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\nit is "


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"data.apply_chat_template \(true\) must be false"):
        chat_prompt(tokenizer, [{"role": "user", "content": "1+1="}])
