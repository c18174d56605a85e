"""Recipes and flags become one checked Config; whatever is wrong is one clear line."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opdlm.config.check import check_config
from megatron_opdlm.config.errors import user_errors
from megatron_opdlm.config.load import load_config, save_config
from megatron_opdlm.config.schema import (
    Config,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    StudentConfig,
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


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("rollout.denoising_steps_per_block=5", "(5) must not exceed rollout.block_size (4)"),
        ("rollout.denoising_steps_per_block=0", "(0) must be at least 1"),
        ("rollout.block_size=0", "rollout.block_size (0) must be at least 1"),
        ("rollout.max_new_tokens=0", "rollout.max_new_tokens (0) must be at least 1"),
        ("rollout.max_new_tokens_by_domain.math=0", "rollout.max_new_tokens_by_domain.math (0) must be at least 1"),
        ("rollout.temperature=-0.1", "rollout.temperature (-0.1) must be at least 0"),
        ("rollout.temperature=.nan", "rollout.temperature (nan) must be at least 0"),
        ("rollout.top_p=0", "rollout.top_p (0.0) must be over 0 and at most 1"),
        ("rollout.top_k=-1", "rollout.top_k (-1) must be at least 0"),
        ("rollout.entropy_bound=-0.1", "rollout.entropy_bound (-0.1) must be at least 0"),
        ("rollout.entropy_bound=.nan", "rollout.entropy_bound (nan) must be at least 0"),
        ("rollout.dynamic_threshold=1.5", "rollout.dynamic_threshold (1.5) must lie between 0 and 1"),
        ("divergence.chunk_size=0", "divergence.chunk_size (0) must be at least 1"),
        ("divergence.top_k=-1", "divergence.top_k (-1) must be at least 0"),
        ("divergence.kind=kl", "divergence.kind (kl) must be one of forward_kl, reverse_kl, mixture, jsd"),
        ("divergence.reverse_weight=1.1", "divergence.reverse_weight (1.1) must lie between 0 and 1"),
        ("divergence.jsd_alpha=1", "divergence.jsd_alpha (1.0) must be over 0 and below 1"),
        ("divergence.jsd_alpha=.nan", "divergence.jsd_alpha (nan) must be over 0 and below 1"),
        (
            "divergence.kind=jsd divergence.top_k=16",
            "divergence.top_k_tail (none) must be renormalize or bucket under divergence.kind (jsd)",
        ),
        ("divergence.teacher_temperature=0", "divergence.teacher_temperature (0.0) must be over 0"),
        ("divergence.teacher_top_k=-1", "divergence.teacher_top_k (-1) must be at least 0"),
        ("divergence.teacher_top_p=0", "divergence.teacher_top_p (0.0) must be over 0 and at most 1"),
        ("divergence.teacher_min_p=2", "divergence.teacher_min_p (2.0) must lie between 0 and 1"),
        (
            "divergence.kind=reverse_kl divergence.teacher_top_p=0.9",
            "divergence.teacher_top_p (0.9) must be 1 under divergence.kind (reverse_kl): KL(student || teacher) is",
        ),
        (
            "divergence.kind=mixture divergence.teacher_top_k=5",
            "divergence.teacher_top_k (5) must be 0 under divergence.kind (mixture)",
        ),
        ("training.loss_reduction=mean", "training.loss_reduction (mean) must be one of sequence, token"),
        ("curricula.length_start=0", "curricula.length_start (0) must be at least 1"),
        ("curricula.threshold_hold_steps=-1", "curricula.threshold_hold_steps (-1) must be at least 0"),
        ("curricula.threshold_start=1.5", "curricula.threshold_start (1.5) must lie between 0 and 1"),
        (
            "curricula.threshold_start=1 rollout.remasking_strategy=sequential",
            "curricula.threshold_start (1.0) needs rollout.remasking_strategy (sequential) to be "
            "low_confidence_dynamic, which alone has a threshold",
        ),
        ("lora.rank=-1", "lora.rank (-1) must be at least 0"),
        ("lora.alpha=0", "lora.alpha (0.0) must be over 0"),
        ("lora.target_modules=[]", "lora.target_modules () must not be empty"),
        ("lora.target_modules=linear_qkv,linear_qkv", "lora.target_modules (linear_qkv, linear_qkv) must not have one"),
        ("lora.target_modules=linear_q", "must be a list, each item one of linear_qkv, linear_proj, linear_fc1"),
        ("states.shrink=0", "states.shrink (0) must be at least 1"),
        ("states.shrink=2", "states.shrink (2) needs states.selection (one_per_block) to be all_steps"),
        ("optimizer.min_lr=1", "optimizer.lr (1e-05) must not be below optimizer.min_lr (1.0)"),
        ("optimizer.min_lr=-1", "optimizer.min_lr (-1.0) must be at least 0"),
        ("optimizer.adam_beta2=1", "optimizer.adam_beta2 (1.0) must be at least 0 and below 1"),
        ("training.num_prompts_per_step=12", "(12) must be a multiple of training.global_batch_size (8)"),
        ("training.pad_to_multiple=6", "training.pad_to_multiple (6) must be a multiple of rollout.block_size (4)"),
        ("parallel.sequence_parallel=true", "needs parallel.tensor_model_parallel_size (1) to be over 1"),
        ("parallel.pipeline_model_parallel_size=0", "parallel.pipeline_model_parallel_size (0) must be at least 1"),
        (
            "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=1",
            "parallel.virtual_pipeline_model_parallel_size (1) must be at least 2",
        ),
        (
            "parallel.virtual_pipeline_model_parallel_size=2",
            "(2) needs parallel.pipeline_model_parallel_size (1) to be over 1",
        ),
        ("parallel.expert_model_parallel_size=0", "parallel.expert_model_parallel_size (0) must be at least 1"),
        (
            "parallel.expert_tensor_parallel_size=2",
            "parallel.expert_tensor_parallel_size (2) must divide parallel.tensor_model_parallel_size (1)",
        ),
        (
            "parallel.expert_model_parallel_size=2 parallel.tensor_model_parallel_size=2",
            "beside parallel.tensor_model_parallel_size (2) needs parallel.sequence_parallel (false) to be true",
        ),
        (
            "parallel.expert_model_parallel_size=2 parallel.pipeline_model_parallel_size=2 "
            "parallel.virtual_pipeline_model_parallel_size=2",
            "virtual_pipeline_model_parallel_size (2) must be null under parallel.expert_model_parallel_size (2)",
        ),
        ("rollout.pipeline_micro_groups=0", "rollout.pipeline_micro_groups (0) must be at least 1"),
        ("rollout.pipeline_micro_groups=2", "(2) needs parallel.pipeline_model_parallel_size (1) to be over 1"),
        (
            'teacher.transformer={"num_layers_in_first_pipeline_stage":3}',
            "teacher.transformer.num_layers_in_first_pipeline_stage (3) must be left out",
        ),
        ("parallel.distributed_timeout_minutes=0", "parallel.distributed_timeout_minutes (0.0) must be over 0"),
        ("checkpoint.keep=-1", "checkpoint.keep (-1) must be at least 0"),
        ("evaluation.max_tasks=0", "evaluation.max_tasks (0) must be at least 1"),
        ("data.max_prompt_tokens=0", "data.max_prompt_tokens (0) must be at least 1"),
        ("student.hf=a student.checkpoint=b", "student.hf (a) and student.checkpoint (b) exclude each other: give one"),
        ("student.mask_token=", "student.mask_token () must not be empty"),
        ("precision.teacher_fp8=delayed", "precision.teacher_fp8 (delayed) must be off, tensorwise or blockwise"),
        (
            "precision.fp8=delayed precision.dtype=float32",
            "precision.fp8 (delayed) needs precision.dtype (float32) to be bfloat16",
        ),
        (
            "precision.teacher_fp8=tensorwise precision.dtype=float32",
            "precision.teacher_fp8 (tensorwise) needs precision.dtype (float32) to be bfloat16",
        ),
        (
            "precision.fp8=tensorwise training.pad_to_multiple=24",
            "(24) must be a multiple of 16 under precision.fp8 (tensorwise)",
        ),
        (
            "precision.teacher_fp8=blockwise training.pad_to_multiple=24",
            "(24) must be a multiple of 16 under precision.teacher_fp8 (blockwise)",
        ),
        ("attention.fp8=true", "attention.fp8 (true) needs precision.fp8 (off) to be delayed or tensorwise"),
        (
            "attention.fp8=true precision.fp8=delayed attention.backend=aten",
            "attention.fp8 (true) needs attention.backend (aten) to be te or auto",
        ),
        (
            'student.transformer={"fp8":"hybrid"}',
            "student.transformer.fp8 (hybrid) needs a recipe, which precision.fp8",
        ),
        (
            'student.transformer={"fp8_dot_product_attention":true} precision.fp8=delayed',
            "student.transformer.fp8_dot_product_attention (True) must be left out: attention.fp8 chooses",
        ),
        (
            'student.transformer={"attention_dropout":0.1}',
            "student.transformer.attention_dropout (0.1) must be left out: training and rollout are the same function",
        ),
        (
            'teacher.transformer={"context_parallel_size":2}',
            "teacher.transformer.context_parallel_size (2) must be left out: parallel.* decides the layout",
        ),
        (
            'student.transformer={"window_size":[128,0]}',
            "student.transformer.window_size ([128, 0]) must be left out: attention is a plain softmax",
        ),
        (
            'student.transformer={"tp_comm_overlap":true}',
            "student.transformer.tp_comm_overlap (True) must be left out: Transformer Engine's user buffers take one",
        ),
        (
            'student.transformer={"no_sync_func":"f"}',
            "student.transformer.no_sync_func (f) must be left out: parallel.overlap_grad_reduce",
        ),
        ("training.recompute=half", "training.recompute (half) must be one of none, selective, full"),
        (
            'training.recompute=full student.transformer={"recompute_modules":["mlp"]}',
            "student.transformer.recompute_modules (['mlp']) must be left out under training.recompute (full)",
        ),
        (
            'teacher.transformer={"recompute_granularity":"full"}',
            "teacher.transformer.recompute_granularity (full) must be left out: the teacher has no backward pass",
        ),
        ("optimizer.cpu_offload_fraction=1.5", "optimizer.cpu_offload_fraction (1.5) must lie between 0 and 1"),
        (
            "optimizer.cpu_offload_fraction=0.5 precision.dtype=float32",
            "optimizer.cpu_offload_fraction (0.5) needs precision.dtype (float32) to be bfloat16",
        ),
        (
            "precision.fp8=blockwise attention.fp8=true",
            "attention.fp8 (true) needs precision.fp8 (blockwise) to be delayed",
        ),
        (
            'teacher.transformer={"fp8_recipe":"delayed"} precision.teacher_fp8=tensorwise',
            "teacher.transformer.fp8_recipe (delayed) must be left out: precision.fp8 and precision.teacher_fp8 choose",
        ),
    ],
)
def test_rules_between_settings_are_checked_when_loading(flags, expected):
    assert expected in message_of([f"--{flag}" for flag in flags.split(" ")])


def test_a_divergence_takes_what_it_is_defined_for():
    for kind in ("forward_kl", "reverse_kl", "mixture", "jsd"):
        for tail in ("renormalize", "bucket"):
            flags = ["--divergence.top_k=16", f"--divergence.top_k_tail={tail}", "--divergence.teacher_temperature=0.5"]
            assert load_config([f"--divergence.kind={kind}", *flags]).divergence.top_k_tail == tail
    for kind in ("forward_kl", "jsd"):
        filters = ["--divergence.teacher_top_k=5", "--divergence.teacher_top_p=0.9", "--divergence.teacher_min_p=0.1"]
        assert load_config([f"--divergence.kind={kind}", *filters]).divergence.teacher_top_k == 5


def test_rows_split_evenly_over_sequence_parallel_ranks():
    parallel = ParallelConfig(tensor_model_parallel_size=3, sequence_parallel=True)
    with pytest.raises(ValueError, match=r"pad_to_multiple \(64\) must be a multiple of parallel.tensor_model"):
        check_config(Config(parallel=parallel), None)
    check_config(Config(parallel=parallel, training=TrainingConfig(pad_to_multiple=24)), None)


@pytest.mark.parametrize(("recipe_name", "multiple"), [("tensorwise", 32), ("delayed", 32), ("blockwise", 256)])
def test_each_sequence_parallel_rank_gets_a_part_that_fp8_can_take(recipe_name, multiple):
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    precision = PrecisionConfig(fp8=recipe_name)

    def config(padding: int) -> Config:
        return Config(parallel=parallel, precision=precision, training=TrainingConfig(pad_to_multiple=padding))

    check_config(config(multiple), None)
    with pytest.raises(ValueError, match=rf"must be a multiple of {multiple} under precision.fp8 \({recipe_name}\)"):
        check_config(config(multiple // 2), None)


def test_processes_must_divide_into_tensor_and_data_parallel_groups():
    flags = ["--parallel.tensor_model_parallel_size=2"]
    load_config(flags, world_size=16)
    assert "(2) must divide the number of processes (3)" in message_of(flags, world_size=3)
    expected = "training.global_batch_size (8) must be a multiple of training.micro_batch_size (1) x data-parallel size"
    assert message_of(flags, world_size=6) == f"{expected} (3) = 3"


def test_experts_take_their_share_of_the_processes():
    flags = ["--parallel.expert_model_parallel_size=4"]
    expected = "parallel.expert_model_parallel_size (4) must divide the number of processes (6)"
    assert expected in message_of(flags, world_size=6)
    load_config(flags, world_size=8)


def test_pipeline_stages_take_their_share_of_the_processes_and_chunks_whole_rounds_of_micro_batches():
    flags = ["--parallel.tensor_model_parallel_size=2", "--parallel.pipeline_model_parallel_size=4"]
    load_config(flags, world_size=16)
    assert "pipeline_model_parallel_size (8) must divide the number of processes (4)" in message_of(flags, world_size=4)
    flags.append("--parallel.virtual_pipeline_model_parallel_size=2")
    load_config(flags, world_size=16)
    expected = "(8) / 4 = 2 micro-batches must be a multiple of parallel.pipeline_model_parallel_size (4)"
    assert expected in message_of([*flags, "--training.micro_batch_size=2"], world_size=16)


def test_what_an_entry_point_requires_must_be_given_and_exist(tmp_path):
    assert message_of([], required=["student"]) == "give student.hf or student.checkpoint"
    assert message_of([], required=["data.train_files"]) == "give data.train_files, at least one file"
    absent = str(tmp_path / "absent")
    assert message_of(["--teacher.hf", absent], required=["teacher"]) == f"teacher.hf: there is no folder {absent}"
    files = ["--evaluation.files", absent]
    assert message_of(files, required=["evaluation.files"]) == f"evaluation.files: there is no file {absent}"
    load_config(files, required=[])
    load_config(["--student.checkpoint", str(tmp_path)], required=["student"])


def test_every_setting_has_a_name_a_default_and_documentation():
    config = Config()
    for name, setting in SETTINGS.items():
        section, field = name.split(".")
        assert getattr(getattr(config, section), field) == setting.default
        assert setting.documentation.endswith(".") and setting.rule
    assert len(SETTINGS) == sum(len(dataclasses.fields(section)) for section in SECTIONS.values())


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
