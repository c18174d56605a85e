"""A short name for what files contain, so that results are never taken for those of other weights or tasks.

folder_fingerprint(Path("runs/mine/checkpoints/best"))                  # "3f9ac2d17b04"
text_fingerprint(json.dumps(tasks))
"""

from __future__ import annotations

import hashlib
from pathlib import Path

NUM_DIGITS = 12
SAMPLE_BYTES = 65536
"""Of a file so much is read at each end: weights that were trained differ everywhere."""


def folder_fingerprint(folder: Path) -> str:
    """Of the names, sizes, beginnings and ends of all files below a folder; where it lies makes no difference."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:NUM_DIGITS]


def text_fingerprint(text: str) -> str:
    """Of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:NUM_DIGITS]
