"""A tiny tokenizer like Qwen3's: bytes, special tokens in ChatML, no mask token."""

from __future__ import annotations

import pytest

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{% if enable_thinking %}<think>{% endif %}"
)


def build_tokenizer(special_tokens=SPECIAL_TOKENS, **settings):
    """Ids 0 to 255 are bytes in the order of the byte-level alphabet, then the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special_tokens])
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE} | settings
    return PreTrainedTokenizerFast(tokenizer_object=model, **settings)


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_tokenizer():
    return build_tokenizer
