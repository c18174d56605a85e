"""Recipes and flags of any content: a Config, or a ValueError in words; never another error, never half a Config."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import Config
from megatron_opdlm.config.settings import SECTIONS, SETTINGS

SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.dates()
VALUE = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(SCALAR.filter(lambda key: key == key), inner, max_size=3)
    ),
    max_leaves=6,
)
SETTING = st.sampled_from(sorted(SETTINGS))


@pytest.fixture(scope="module")
def recipe() -> Path:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "recipe.yaml"


def assert_config_or_words(arguments: list[str]) -> None:
    try:
        config = load_config(arguments)
    except ValueError as error:
        assert str(error).strip(), "an error must say something"
    else:
        assert isinstance(config, Config)


@settings(max_examples=60)
@given(content=st.binary(max_size=60))
@example(b"{a: &x [*x]}")
@example(b"&x {rollout: *x}")
@example(b"? [a]\n: b")
@example(b"? {a: b}\n: c")
@example(b"rollout: {<<: {block_size: 4}}")
@example(b"rollout: {<<: 3}")
@example(b"student: {transformer: {<<: 3}}")
@example(b"student: {transformer: &x {a: *x}}")
@example(b"--- {}\n--- {}")
@example(b"rollout: !!python/object/apply:os.system ['true']")
@example(b"training: {max_steps: !!int 'x'}")
@example(b"training: {seed: 2001-13-45}")
@example(b"\xff\xfe")
@example(b"%YAML 9.9\n---\n{}")
def test_any_bytes_for_a_recipe(recipe, content):
    recipe.write_bytes(content)
    assert_config_or_words(["--config", str(recipe)])


@settings(max_examples=60)
@given(name=SETTING, value=VALUE)
@example("student.transformer", {1: 2})
@example("student.transformer", {None: None})
@example("rollout.max_new_tokens_by_domain", {3: "x"})
@example("training.max_steps", float("inf"))
@example("training.grace_seconds", float("nan"))
@example("checkpoint.directory", "\0")
def test_any_value_of_a_setting_in_a_recipe(recipe, name, value):
    section, _, key = name.rpartition(".")
    recipe.write_text(yaml.safe_dump(nested(section, {key: value}), allow_unicode=True), encoding="utf-8")
    assert_config_or_words(["--config", str(recipe)])


def nested(section: str, content: object) -> object:
    for part in reversed(section.split(".")):
        content = {part: content}
    return content


@settings(max_examples=60)
@given(section=st.sampled_from(sorted(SECTIONS)), value=VALUE)
def test_any_value_for_a_section(recipe, section, value):
    recipe.write_text(yaml.safe_dump(nested(section, value), allow_unicode=True), encoding="utf-8")
    assert_config_or_words(["--config", str(recipe)])


@settings(max_examples=60)
@given(
    arguments=st.lists(
        st.text(max_size=12)
        | SETTING.map("--{}".format)
        | st.tuples(SETTING, st.text(max_size=12)).map(lambda pair: f"--{pair[0]}={pair[1]}"),
        max_size=4,
    )
)
@example(["--config"])
@example(["--config="])
@example(["--rollout.block_size", "[["])
@example(["--data.train_files", "[["])
@example(["--evaluation.files", "["])
@example(["--student.transformer", "{"])
@example(["--student.transformer={'a': "])
@example(["--student.transformer.a.b", "1"])
@example(["--rollout.stop_token_ids", "&x"])
@example(["--rollout.stop_token_ids", "1_0:"])
@example(["--"])
@example(["-h=1"])
def test_any_flags(arguments):
    if not any(argument.split("=")[0] in ("--help", "-h", "--print_config") for argument in arguments):
        assert_config_or_words(arguments)


@pytest.mark.parametrize("content", ["[" * 20_000, "{a: " * 20_000, "- " * 20_000])
def test_nesting_that_a_parser_cannot_bear_is_refused(recipe, content):
    recipe.write_text(content)
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        load_config(["--config", str(recipe)])


def test_a_folder_or_a_missing_file_is_no_recipe(tmp_path):
    for path in (tmp_path, tmp_path / "no.yaml"):
        with pytest.raises(ValueError, match="there is no file"):
            load_config(["--config", str(path)])


def test_null_is_refused_where_a_setting_does_not_take_it(recipe):
    recipe.write_text("divergence: {jsd_alpha: null}")
    with pytest.raises(ValueError, match=r"divergence\.jsd_alpha \(null\) must be a number"):
        load_config(["--config", str(recipe)])
    recipe.write_text("checkpoint: {directory: null}")
    assert load_config(["--config", str(recipe)]).checkpoint.directory is None


def test_a_value_that_holds_itself_and_a_key_that_is_no_name_are_refused(recipe):
    recipe.write_text("student: {transformer: &x {a: *x}}")
    with pytest.raises(ValueError, match=r"recipe\.yaml: a value is nested too deeply, or holds itself"):
        load_config(["--config", str(recipe)])
    recipe.write_text("student: {transformer: {1: 2}}")
    with pytest.raises(ValueError, match=r"student\.transformer has the key 1, which must be the name of a field"):
        load_config(["--config", str(recipe)])
