"""Fingerprints tell contents apart, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_opdlm.evaluation.fingerprint import NUM_SAMPLES, SAMPLE_BYTES, folder_fingerprint, text_fingerprint

WEIGHTS = "model.safetensors"


def make_folder(root: Path) -> Path:
    (root / "hf").mkdir(parents=True)
    (root / "hf" / "config.json").write_text("{}")
    (root / WEIGHTS).write_bytes(bytes(range(256)) * (2 * NUM_SAMPLES * SAMPLE_BYTES // 256))
    return root


def test_a_copy_has_the_same_fingerprint_and_a_changed_renamed_or_further_file_another(tmp_path):
    original = make_folder(tmp_path / "original")
    expected = folder_fingerprint(original)
    assert folder_fingerprint(shutil.copytree(original, tmp_path / "copy")) == expected
    changes = {
        "first byte": lambda root: (root / WEIGHTS).write_bytes(b"x" + (original / WEIGHTS).read_bytes()[1:]),
        "last byte": lambda root: (root / WEIGHTS).write_bytes((original / WEIGHTS).read_bytes()[:-1] + b"x"),
        "shorter": lambda root: (root / WEIGHTS).write_bytes((original / WEIGHTS).read_bytes()[:-256]),
        "renamed": lambda root: (root / WEIGHTS).rename(root / "weight.safetensors"),
        "another file": lambda root: (root / "more.json").write_bytes(b""),
    }
    for name, change in changes.items():
        changed = shutil.copytree(original, tmp_path / name)
        change(changed)
        assert folder_fingerprint(changed) != expected, name


def test_texts_have_different_fingerprints():
    assert text_fingerprint("a") == text_fingerprint("a") != text_fingerprint("b")
