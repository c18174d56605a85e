"""Recipes and flags become one checked Config; whatever is wrong is one clear line."""

from __future__ import annotations

import dataclasses
import json
import operator
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opdlm.config.errors import user_errors
from megatron_opdlm.config.load import load_config, save_config
from megatron_opdlm.config.schema import (
    Config,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    RolloutConfig,
    StudentConfig,
    SweepConfig,
    TrainingConfig,
)
from megatron_opdlm.config.settings import SECTIONS, SETTINGS, nearest_name


def recipe(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def message_of(arguments: list[str], **kwargs: object) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(arguments, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_arguments_give_the_defaults_of_the_schema():
    assert load_config([]) == Config()


def test_recipes_are_layered_left_to_right_and_flags_come_last(tmp_path):
    first = recipe(tmp_path, "rollout: {block_size: 8, top_k: 1, temperature: 0.5}\ntraining: {seed: 1}", "a.yaml")
    second = recipe(tmp_path, "rollout:\n  top_k: 2\n  temperature: 0.25\n", "b.yaml")
    config = load_config(["--rollout.temperature", "0", "--config", first, f"--config={second}"])
    assert config.rollout == RolloutConfig(block_size=8, top_k=2, temperature=0.0)
    assert config.training == TrainingConfig(seed=1)


def test_a_list_flag_takes_commas_spaces_and_yaml():
    assert load_config(["--data.train_files", "a.json"]).data == DataConfig(train_files=["a.json"])
    for spelling in (["1,2"], ["1", "2"], ["[1, 2]"]):
        assert load_config(["--rollout.stop_token_ids", *spelling]).rollout.stop_token_ids == [1, 2]


def test_a_flag_may_set_one_entry_of_a_typed_mapping():
    config = load_config(["--rollout.max_new_tokens_by_domain.math", "16"])
    assert config.rollout.max_new_tokens_by_domain == {"math": 16}


def test_a_section_of_a_section_is_read_from_recipe_and_flag_and_saved(tmp_path):
    path = recipe(tmp_path, "evaluation:\n  max_tasks: 3\n  sweep: {thresholds: [0.5, 1]}")
    config = load_config(["--config", path, "--evaluation.sweep.block_sizes", "[4,8]"])
    assert config.evaluation.max_tasks == 3
    assert config.evaluation.sweep == SweepConfig(thresholds=[0.5, 1.0], block_sizes=[4, 8])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_wrong_setting_of_a_section_of_a_section_is_named(tmp_path):
    nearest = "is not a setting; the nearest is evaluation.sweep.thresholds"
    assert message_of(["--evaluation.sweep.threshold", "1"]) == f"--evaluation.sweep.threshold {nearest}"
    path = recipe(tmp_path, "evaluation:\n  sweep:\n    threshold: [1]")
    assert message_of(["--config", path]) == f"{path}, line 3: evaluation.sweep.threshold {nearest}"
    path = recipe(tmp_path, "evaluation:\n  sweep: 3")
    assert message_of(["--config", path]).endswith("section evaluation.sweep must hold settings, indented below it")
    expected = "evaluation.sweep.thresholds (many) must be a list, each item a number"
    assert message_of(["--evaluation.sweep.thresholds", "many"]) == expected


def test_exponents_without_a_point_are_numbers(tmp_path):
    path = recipe(tmp_path, "optimizer: {lr: 2e-5}\nstudent: {transformer: {layernorm_epsilon: 1e-7, moe: full}}")
    config = load_config(["--config", path])
    assert config.optimizer.lr == 0.00002
    assert config.student.transformer == {"layernorm_epsilon": 0.0000001, "moe": "full"}


def test_a_bare_off_is_the_choice_of_that_name_in_recipe_flag_and_saved_config(tmp_path):
    path = recipe(tmp_path, "precision: {fp8: off, teacher_fp8: blockwise}\nlogging: {tensorboard: off}")
    config = load_config(["--config", path])
    assert (config.precision.fp8, config.precision.teacher_fp8) == ("off", "blockwise")
    assert config.logging.tensorboard is False
    off_again = load_config(["--config", path, "--precision.teacher_fp8", "off"])
    assert off_again.precision.teacher_fp8 == "off"
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    assert load_config(["--config", recipe(tmp_path, "precision: {fp8: delayed}", "b.yaml")]).precision.fp8 == "delayed"


def test_a_choice_with_off_takes_no_other_word_for_it(tmp_path):
    rule = "must be one of off, delayed, tensorwise, blockwise"
    assert message_of(["--precision.fp8", "false"]) == f"precision.fp8 (false) {rule}"
    path = recipe(tmp_path, "precision: {fp8: on}")
    assert message_of(["--config", path]) == f"precision.fp8 (True) {rule}"


def test_a_saved_config_reads_back_equal(tmp_path):
    config = Config(
        student=StudentConfig(hf="1e5", mask_token="<｜mask｜>", transformer={"a": "2", "b": 1e-20, "c": [1, None]}),
        data=DataConfig(train_files=["null", "true", "2026-01-01", "a, b"]),
        rollout=RolloutConfig(max_new_tokens_by_domain={"math": 5}, dynamic_threshold=1 / 3),
        logging=LoggingConfig(directory="- ~"),
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rollout.blok_size", "3"], "--rollout.blok_size is not a setting; the nearest is rollout.block_size"),
        (["--block_size=3"], "--block_size is not a setting; the nearest is rollout.block_size"),
        (["--trainning.seed=3"], "--trainning.seed is not a setting; the nearest is training.seed"),
        (["--rollout.block_size", "x"], "rollout.block_size (x) must be an integer"),
        (["--rollout.block_size", "4.0"], "rollout.block_size (4.0) must be an integer"),
        (["--precision.dtype", "fp8"], "precision.dtype (fp8) must be one of bfloat16, float32"),
        (["--curricula.length_start", "q"], "curricula.length_start (q) must be an integer or null"),
        (["--rollout.stop_token_ids", "1,q"], "rollout.stop_token_ids (q) must be a list, each item an integer"),
        (["--student.hf"], "argument --student.hf: expected one argument"),
        (["--data.train_files"], "--data.train_files needs a value: a list, each item text"),
        (["--config"], "--config needs a file"),
        (["--config", "absent.yaml"], "--config: there is no file absent.yaml"),
        (["recipe.yaml"], "unrecognized arguments: recipe.yaml"),
    ],
)
def test_a_wrong_flag_is_named_with_what_would_be_right(arguments, expected):
    assert message_of(arguments) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rollout:\n  blok_size: 3", ", line 2: rollout.blok_size is not a setting; the nearest is rollout.block_size"),
        ("rollouts:\n  top_k: 3", ", line 1: rollouts is not a setting; the nearest is rollout."),
        ("rollout: {top_k: 1}\nrollout: {top_p: 1}", ", line 2: rollout is given twice"),
        ("rollout:\n", ", line 1: section rollout must hold settings, indented below it"),
        ("", " must hold sections with settings"),
        ("rollout: {[", " is not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_named_with_its_line(tmp_path, text, expected):
    path = recipe(tmp_path, text)
    assert message_of(["--config", path]).startswith(path + expected)


def test_a_wrong_value_in_a_recipe_names_setting_value_and_rule(tmp_path):
    path = recipe(tmp_path, "data: {train_files: a.json}")
    assert message_of(["--config", path]) == "data.train_files (a.json) must be a list, each item text"


def test_what_an_entry_point_requires_must_be_given_and_exist(tmp_path):
    assert message_of([], required=["student"]) == "give student.hf or student.checkpoint"
    assert message_of([], required=["data.train_files"]) == "give data.train_files, at least one file"
    absent = str(tmp_path / "absent")
    assert message_of(["--teacher.hf", absent], required=["teacher"]) == f"teacher.hf: there is no folder {absent}"
    files = ["--evaluation.files", absent]
    validation = [*files, "--evaluation.interval", "5"]
    assert message_of(validation, required=["validation"]) == f"evaluation.files: there is no file {absent}"
    student = ["--student.checkpoint", str(tmp_path)]
    assert message_of([*files, *student], required=["evaluation"]) == f"evaluation.files: there is no file {absent}"
    as_teacher = ["--evaluation.role", "teacher", *student]
    assert message_of(as_teacher, required=["evaluation.role"]) == "give teacher.hf or teacher.checkpoint"
    load_config(files, required=[])
    load_config(["--student.checkpoint", str(tmp_path)], required=["student"])


def test_every_setting_has_a_name_a_default_and_documentation():
    config = Config()
    for name, setting in SETTINGS.items():
        assert operator.attrgetter(name)(config) == setting.default
        assert setting.documentation.endswith(".") and setting.rule
    fields = [field for section in (Config, *SECTIONS.values()) for field in dataclasses.fields(section)]
    assert len(SETTINGS) == len(fields) - len(SECTIONS), "every field is a setting or a section"


def test_the_nearest_name_prefers_the_same_field_of_another_section():
    assert nearest_name("training.lr") == "optimizer.lr"
    assert nearest_name("optimizer.learning_rate").startswith("optimizer.")


def test_a_user_error_is_one_line_on_stderr_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as stopped, user_errors():
        load_config(["--rollout.top_p=2"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: rollout.top_p (2.0) must be over 0 and at most 1\n"


def test_an_error_of_another_library_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit), user_errors():
        json.loads("{]")
    captured = capsys.readouterr().err
    assert "Traceback" in captured and captured.splitlines()[-1].startswith("error: Expecting property name")


@pytest.mark.parametrize("flag", ["--help", "--print_config"])
def test_help_answers_within_a_second_of_work_without_torch(flag):
    program = (
        "import sys\nfrom megatron_opdlm.config.load import load_config\n"
        f"try: load_config(['{flag}'])\nexcept SystemExit as stopped: assert stopped.code == 0\n"
        "assert not {'torch', 'numpy', 'megatron'} & set(sys.modules), 'a heavy import'"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert "block_size" in done.stdout


def test_the_printed_config_is_a_recipe(tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_config(["--optimizer.lr", "2e-5", "--print_config"])
    path = recipe(tmp_path, capsys.readouterr().out)
    assert load_config(["--config", path]) == Config(optimizer=OptimizerConfig(lr=2e-5))


def test_the_process_ends_with_exit_code_2():
    command = [sys.executable, "-m", "megatron_opdlm.train", "--rollout.blok_size", "4"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --rollout.blok_size is not a setting; the nearest is rollout.block_size\n"
