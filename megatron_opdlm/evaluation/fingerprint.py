"""A short name for what files contain, so that results are never taken for those of other weights or tasks.

folder_fingerprint(Path("runs/mine/checkpoints/best"))                  # "3f9ac2d17b04"
text_fingerprint(json.dumps(tasks))
"""

from __future__ import annotations

import hashlib
from pathlib import Path

NUM_DIGITS = 12
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".distcp", ".pt", ".metadata")
"""Endings, or names, of the files that decide what a model answers."""
SAMPLE_BYTES, NUM_SAMPLES = 2**16, 16
"""Of each file so many pieces are read, spread evenly: weights that were trained differ everywhere."""


def folder_fingerprint(folder: Path) -> str:
    """Of the names, sizes and samples of the files of a model, in seconds for any size; where they lie is no matter."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (path.suffix in MODEL_FILES or path.name in MODEL_FILES):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size}\n".encode())
            digest.update(_samples(path, size))
    return digest.hexdigest()[:NUM_DIGITS]


def text_fingerprint(text: str) -> str:
    """Of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:NUM_DIGITS]


def _samples(path: Path, size: int) -> bytes:
    if size <= SAMPLE_BYTES * NUM_SAMPLES:
        return path.read_bytes()
    pieces = []
    with path.open("rb") as file:
        for number in range(NUM_SAMPLES):
            file.seek(number * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
            pieces.append(file.read(SAMPLE_BYTES))
    return b"".join(pieces)
