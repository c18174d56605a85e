"""A Qwen3 of a few thousand parameters with a real tokenizer, written as a Hugging Face folder for the tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch

CHARACTERS = "0123456789+-*/=. abcdefghijklmnopqrstuvwxyz\n"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_qwen3(
    folder: Path,
    *,
    tie: bool = False,
    num_layers: int = 2,
    hidden_size: int = 32,
    num_heads: int = 4,
    num_groups: int = 2,
    head_dim: int = 12,
    spare_rows: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Weights drawn from `seed`, non-trivial norms, `spare_rows` embedding rows beyond the tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + spare_rows,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups,
        head_dim=head_dim,
        max_position_embeddings=512,
        rope_theta=1e6,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.2 * drawn)
    model.to(dtype).save_pretrained(folder)
    return folder


def make_tokenizer(folder: Path):
    """One token per character, Qwen3's special tokens, a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: index for index, character in enumerate(CHARACTERS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        chat_template=CHAT_TEMPLATE,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_prompts(path: Path, num: int) -> Path:
    """Sums to complete, of varying length."""
    rows = [{"question": "+".join(str((7 * i + j) % 100) for j in range(2 + i % 4)) + "="} for i in range(num)]
    path.write_text("".join(json.dumps(row | {"domain": "math"}) + "\n" for row in rows))
    return path


def write_answered_prompts(path: Path, num: int) -> Path:
    """Sums of varying length, each with its result as the `response`."""
    terms = [[(7 * i + j) % 100 for j in range(2 + i % 4)] for i in range(num)]
    rows = [{"question": "+".join(map(str, row)) + "=", "response": f"{row[0]} and so on, {sum(row)}"} for row in terms]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
