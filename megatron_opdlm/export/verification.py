"""After writing: does the folder hold what was meant?

    written = Digests()
    write_hf_folder(checkpoint, folder, dtype=None, through=written.note)       # takes note of every tensor
    written.check(folder)                                                       # reads all of them again
    check_reloads(folder, architecture, serving)                                # so do config and tokenizer

What was written may still be in the page cache, so a disk that forgets it later is not found out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_opdlm.checkpointing.hf_folder import SafetensorsReader
from megatron_opdlm.checkpointing.hf_qwen3 import check_hf_weights
from megatron_opdlm.data.tokenizer import end_token_ids, load_tokenizer
from megatron_opdlm.export.serving import IN_GENERATION_CONFIG, Serving
from megatron_opdlm.models.qwen3 import Qwen3Architecture, read_architecture

Digest = tuple[torch.dtype, tuple[int, ...], str]


class Digests:
    """Number format, shape and hash of every tensor on its way to the files."""

    def __init__(self) -> None:
        self.by_name: dict[str, Digest] = {}

    def note(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, noted as they pass."""
        for name, tensor in tensors:
            self.by_name[name] = _digest(tensor)
            yield name, tensor

    def check(self, folder: Path) -> None:
        """ValueError for the first tensor of the folder that is missing, extra or differs in a bit."""
        weights = SafetensorsReader(folder)
        if differing := sorted(weights.names ^ self.by_name.keys()):
            raise ValueError(f"reading the files again: {differing[0]} is missing, or was not meant to be there")
        for name, digest in self.by_name.items():
            if _digest(weights.read(name)) != digest:
                raise ValueError(f"reading the files again: {name} is not what was written")


def _digest(tensor: torch.Tensor) -> Digest:
    content = tensor.contiguous().view(torch.uint8).numpy()
    return tensor.dtype, tuple(tensor.shape), hashlib.blake2b(content).hexdigest()


def check_reloads(folder: Path, architecture: Qwen3Architecture, serving: Serving | None) -> None:
    """ValueError unless config, weights and tokenizer are read back as that model, by us and by transformers."""
    found = read_architecture(folder)
    if found != architecture:
        raise ValueError(f"reading the files again: config.json says {found}, and {architecture} was meant")
    check_hf_weights(SafetensorsReader(folder), architecture)
    tokenizer = load_tokenizer(folder)
    if serving is not None:
        ends = end_token_ids(tokenizer, folder)
        if (tokenizer.mask_token_id, ends) != (serving.mask_token_id, serving.end_token_ids):
            raise ValueError(f"reading the files again: mask and end tokens are {tokenizer.mask_token_id} and {ends}")
    _check_config(folder, architecture)
    if serving is not None:
        _check_decoding(folder, serving)


def _check_config(folder: Path, architecture: Qwen3Architecture) -> None:
    """In transformers, without running code of the folder: an SDAR's config is read as the Qwen3's that it is."""
    from transformers import AutoConfig

    values = json.loads((folder / "config.json").read_text())
    model_type = values.pop("model_type").replace("sdar", "qwen3")
    config = AutoConfig.for_model(model_type, **values)
    shape = (config.hidden_size, config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings)
    meant = (architecture.hidden_size, architecture.num_hidden_layers, architecture.vocab_size)
    if shape != (*meant, architecture.tie_word_embeddings):
        raise ValueError(f"reading the files again: transformers takes config.json for a model of {shape}")


def _check_decoding(folder: Path, serving: Serving) -> None:
    """What transformers makes of generation_config.json, which is what a `generate` gets to see."""
    from transformers import GenerationConfig

    found = GenerationConfig.from_pretrained(folder)
    for name, key in IN_GENERATION_CONFIG.items():
        if getattr(found, key, None) != getattr(serving.rollout, name):
            raise ValueError(f"reading the files again: transformers does not find {key} in generation_config.json")
