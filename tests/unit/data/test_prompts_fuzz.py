"""Prompt files of any content: prompts, or a ValueError that names the file; never another error."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_opdlm.data.prompts import PromptSet, read_prompts

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=6,
)
TEXT = st.text(max_size=12) | st.sampled_from(["\ud800", "a\0b", "<|im_start|>", "{{ x }}", "\u2028", ""])
MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "more"]), TEXT | JSON, max_size=3)
ROW = st.fixed_dictionaries(
    {"question": TEXT | st.lists(MESSAGE, max_size=2) | JSON},
    optional={"domain": TEXT | JSON, "source": JSON, "entry": JSON, "response": TEXT | JSON},
)


@pytest.fixture(scope="module")
def folder() -> Path:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def assert_prompts_or_the_file_is_named(path: Path, tokenizer, **settings: object) -> None:
    given = {"max_prompt_tokens": 1000, "apply_chat_template": False, "enable_thinking": False} | settings
    try:
        read = read_prompts([path], tokenizer, **given)
    except ValueError as error:
        assert path.name in str(error) or "leaves none of the" in str(error), error
    else:
        assert isinstance(read, PromptSet) and read.prompts


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".json", ".jsonl", ".parquet"]))
@example(b"\xef\xbb\xbf[]", ".json")
@example(b'{"question": "a"}\x00', ".jsonl")
@example(b"PAR1PAR1", ".parquet")
@example(b"PAR1" + bytes(8) + b"PAR1", ".parquet")
@example(b'{"question": ' + b"1" * 5000 + b"}", ".jsonl")
@example(b"[" * 100_000, ".json")
@example(b"[" * 100_000, ".jsonl")
@example(b'{"question": "\\ud800"}', ".jsonl")
def test_any_bytes_for_a_prompt_file(folder, tokenizer, content, suffix):
    path = folder / f"prompts{suffix}"
    path.write_bytes(content)
    assert_prompts_or_the_file_is_named(path, tokenizer)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(ROW | JSON, max_size=3),
    chat=st.booleans(),
    limit=st.none() | st.just(20),
    suffix=st.sampled_from([".json", ".jsonl"]),
)
@example([{"question": "\ud800"}], True, None, ".jsonl")
@example([{"question": [{"role": "\ud800", "content": "a"}]}], True, None, ".json")
@example([{"question": "a", "response": "\ud800"}], True, 20, ".json")
def test_any_rows_of_a_prompt_file(folder, tokenizer, rows, chat, limit, suffix):
    path = folder / f"prompts{suffix}"
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
    assert_prompts_or_the_file_is_named(path, tokenizer, apply_chat_template=chat, max_response_tokens=limit)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_parquet_file_with_some_bytes_changed(folder, tokenizer, data):
    import pyarrow
    import pyarrow.parquet

    path = folder / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"question": "1+1", "domain": "math"}] * 3), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    assert_prompts_or_the_file_is_named(path, tokenizer)
