"""Relatives of Qwen3 of a few thousand parameters, as Hugging Face folders: a Qwen2.5, and an SDAR made of a Qwen3.

make_tiny_qwen2(folder)                                  # biases that are not zero, no head_dim
make_tiny_sdar(folder, make_tiny_qwen3(other))           # the same tensors under SDAR's config, code and tokenizer
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from tests.tiny_qwen3 import make_tokenizer

MASK_TOKEN = "<|MASK|>"


def make_tiny_qwen2(folder: Path, *, tie: bool = False, spare_rows: int = 3, seed: int = 0) -> Path:
    """Weights and biases drawn from `seed`; a sliding window that is written down but off, as Qwen publishes it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + spare_rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tie,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generator = torch.Generator().manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.2 * drawn)
    model.save_pretrained(folder)
    edit_json(folder / "config.json", use_sliding_window=False, sliding_window=64, max_window_layers=1)
    return folder


def make_tiny_sdar(folder: Path, qwen3: Path) -> Path:
    """The keys of JetLM's SDAR-4B-Chat, which names no mask token; its tokenizer has it. Untied, as all of them are."""
    shutil.copytree(qwen3, folder)
    tokenizer = make_tokenizer(folder)
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    tokenizer.save_pretrained(folder)
    edit_json(
        folder / "config.json",
        architectures=["SDARForCausalLM"],
        model_type="sdar",
        auto_map={
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        rope_theta=1_000_000,
        rope_scaling=None,
        rope_parameters=None,
        sliding_window=None,
        fuse_cross_entropy=True,
    )
    edit_json(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", "tokenization_qwen2_fast.Qwen2TokenizerFast"]},
    )
    for module in ("configuration_sdar", "modeling_sdar", "tokenization_qwen2_fast"):
        (folder / f"{module}.py").write_text('raise RuntimeError("code of a folder must not run")\n')
    return folder


def edit_json(path: Path, **values) -> None:
    """Sets keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")
