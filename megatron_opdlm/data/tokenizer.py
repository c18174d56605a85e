"""The tokenizer of a Hugging Face folder, the mask token, the end tokens, and whether two tokenizers agree.

Everything is read from local files, and code that a folder may bring along is never run.

Example:

    tokenizer = load_tokenizer("Qwen3-1.7B")
    mask_token_id = add_mask_token(tokenizer, "<|MASK|>")              # 151669, the first id that Qwen3 leaves free
    end_ids = end_token_ids(tokenizer, "Qwen3-1.7B")                   # (151645, 151643)
    check_same_tokenizer(tokenizer, load_tokenizer("Qwen3-8B"), "<|MASK|>")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers makes an empty tokenizer out of a folder that has a config.json but no vocabulary.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`.

    Raises:
        ValueError: the folder or its tokenizer files are missing or malformed.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder to read a tokenizer from")
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ValueError(f"{folder}: no tokenizer there; it must hold one of {', '.join(VOCABULARY_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if not _is_of_files(error) and not _is_of_files(error.__cause__):
            raise
        raise ValueError(f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {error}") from error


def _is_of_files(error: BaseException | None) -> bool:
    """Whether the files are to blame, and not the program.

    The Rust library behind fast tokenizers raises bare `Exception`. huggingface_hub raises classes of its own, caused
    by one of these, where a config contradicts itself.
    """
    return type(error) is Exception or isinstance(error, OSError | ValueError | KeyError | TypeError)


def add_mask_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Make `text` the tokenizer's mask token, adding it as a special token if it is not there. Returns its id.

    The tokenizer is changed in place; whoever owns the model makes room for an id at `len(tokenizer) - 1`.

    Raises:
        ValueError: `text` is the end token or an ordinary word of the vocabulary, which would then be masked too.
    """
    if text == tokenizer.eos_token:
        raise ValueError(f"student.mask_token ({text}) must not be the tokenizer's end token")
    if text in tokenizer.get_vocab() and text not in tokenizer.get_added_vocab():
        raise ValueError(f"student.mask_token ({text}) must not be an ordinary token of the vocabulary")
    tokenizer.add_special_tokens({"mask_token": text})
    return tokenizer.mask_token_id


def end_token_ids(tokenizer: PreTrainedTokenizerBase, hf_folder: str | Path) -> tuple[int, ...]:
    """The tokens that end a response: the tokenizer's end token, then those of the folder's `generation_config.json`.

    Raises:
        ValueError: neither names one, or the file is malformed.
    """
    path = Path(hf_folder) / "generation_config.json"
    listed = _listed_end_tokens(path) if path.is_file() else []
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not own + listed:
        raise ValueError(f"{hf_folder}: neither the tokenizer nor generation_config.json names an end token")
    return tuple(dict.fromkeys(own + listed))


def _listed_end_tokens(path: Path) -> list[int]:
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    listed = settings.get("eos_token_id") if isinstance(settings, dict) else "no settings"
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(token_id) is int for token_id in listed):
        raise ValueError(f"{path}: eos_token_id ({listed}) must be a token id or a list of them")
    return listed


def check_same_tokenizer(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase, mask_token: str
) -> None:
    """Check that every token id but the mask token's means the same to both models.

    Raises:
        ValueError: names the lowest id at which they differ.
    """
    student, teacher = (
        {token_id: token for token, token_id in tokenizer.get_vocab().items() if token != mask_token}
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    )
    if student == teacher:
        return
    first = min(i for i in student.keys() | teacher.keys() if student.get(i) != teacher.get(i))
    raise ValueError(
        "student and teacher must have the same tokenizer, apart from the mask token: "
        f"token {first} is {_quoted(student, first)} for the student and {_quoted(teacher, first)} for the teacher "
        f"({len(student)} and {len(teacher)} tokens)"
    )


def _quoted(vocabulary: dict[int, str], token_id: int) -> str:
    return repr(vocabulary[token_id]) if token_id in vocabulary else "missing"
