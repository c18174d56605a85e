"""An exported folder is the student: its logits and its tokens, in transformers, with and without the folder's code.

The student starts from the quickstart's teacher, so its tokens are not noise; the mixture and the shifted one are tiny.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opdlm.config.load import save_config
from megatron_opdlm.config.schema import Config, ParallelConfig, RolloutConfig, StudentConfig
from megatron_opdlm.data.prompts import Prompt
from tests.references import masked_logits
from tests.tiny_moe import make_tiny_moe
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.tiny_relatives import MASK_TOKEN, make_tiny_qwen2, make_tiny_sdar
from tests.worlds import gathered_logits, layout, load_student, tiny_config

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "teacher"
TOLERANCE = 1e-4
NUM_PROMPTS = 50
DYNAMIC = {"dynamic_threshold": 0.5}
"""Low enough for steps that commit several tokens."""


@pytest.fixture(autouse=True)
def code_cache(tmp_path):
    """Where transformers copies the code of folders to, instead of the user's cache."""
    path = list(sys.path)
    with mock.patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")):
        yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]  # or a later folder of another name is looked for in this cache


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, world_of_one) -> dict[str, Path]:
    """Students as Megatron checkpoints."""
    from megatron_opdlm.checkpointing.conversion import hf_to_megatron

    root = tmp_path_factory.mktemp("export")
    folders = {
        "quickstart": QUICKSTART,
        "tiny": make_tiny_qwen3(root / "tiny-hf", seed=3),
        "mixture": make_tiny_moe(root / "mixture-hf", seed=4),
        "qwen2": make_tiny_qwen2(root / "qwen2-hf", seed=5),
        "sdar": make_tiny_sdar(root / "sdar-hf", root / "tiny-hf"),
    }
    for name, folder in folders.items():
        with layout(ParallelConfig()):
            hf_to_megatron(str(folder), root / name, role="student", dtype=None, mask_token=MASK_TOKEN)
    return {name: root / name for name in folders}


def export(checkpoint: Path, output: Path, **options) -> Path:
    from megatron_opdlm.export.hf_package import ExportOptions, export_hf

    export_hf(checkpoint, output, ExportOptions(**({"rollout": {"block_size": 4}} | options)))
    return output


def config_of(checkpoint: Path, rollout: RolloutConfig) -> Config:
    from dataclasses import replace

    config = tiny_config(checkpoint, backend="aten", rollout=rollout)
    return replace(config, student=StudentConfig(checkpoint=str(checkpoint)))


def token_ids(num: int, vocab_size: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, num), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def clean_logits(checkpoint: Path, ids_BT: torch.Tensor) -> torch.Tensor:
    """The Megatron student's, in a training forward whose noisy half is clean too."""
    with layout(ParallelConfig()) as groups:
        model, _ = load_student(config_of(checkpoint, RolloutConfig(block_size=4)), groups)
        lengths_B = torch.full((len(ids_BT),), ids_BT.shape[1])
        positions = torch.arange(ids_BT.shape[1])
        return gathered_logits(model, model(torch.cat([ids_BT, ids_BT]), positions, lengths_B))[: len(ids_BT)]


def load(folder: Path, with_code: bool):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=with_code).eval()


@pytest.mark.parametrize("name", ["quickstart", "mixture", "qwen2"])
def test_plain_transformers_gives_the_megatron_students_logits(checkpoints, tmp_path, name):
    folder = export(checkpoints[name], tmp_path / "hf")
    assert not list(folder.glob("*.py"))
    ids_BT = token_ids(16, 49)
    block_T = torch.arange(16) // 4
    model = load(folder, with_code=False)
    assert type(model).__module__.startswith("transformers.models.qwen")
    with torch.no_grad():
        logits = masked_logits(model, ids_BT, torch.arange(16), (block_T[:, None] >= block_T).expand(2, 16, 16))
    expected = clean_logits(checkpoints[name], ids_BT)[..., : logits.shape[-1]]
    assert (logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["quickstart", "mixture"])
def test_an_sdar_folder_gives_them_by_its_own_code_and_as_the_qwen3_that_it_is(checkpoints, tmp_path, name):
    from transformers import Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = export(checkpoints[name], tmp_path / "hf", format="sdar", max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    ids_BT = token_ids(16, 49)
    expected = clean_logits(checkpoints[name], ids_BT)
    if name == "mixture":
        config = Qwen3MoeConfig.from_pretrained(folder, model_type="qwen3_moe")
        plain, info = Qwen3MoeForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
    else:
        plain, info = Qwen3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    own = load(folder, with_code=True)
    assert type(own).__name__ == ("SDARMoeForCausalLM" if name == "mixture" else "SDARForCausalLM")
    assert own.config.model_type == ("sdar_moe" if name == "mixture" else "sdar")
    assert own.config.rope_theta == 1e6
    for model in (plain.eval(), own):
        with torch.no_grad():
            logits = model(ids_BT, attention_mask=own.block_causal_mask(0, 16, 4)).logits
        difference = (logits - expected[..., : logits.shape[-1]]).abs()
        difference[..., own.config.mask_token_id] = 0  # has a row of its own, see below
        assert difference.max() <= TOLERANCE


@pytest.mark.parametrize("name", ["quickstart", "sdar"])
def test_servers_that_read_the_mask_tokens_logit_never_find_it_largest(checkpoints, tmp_path, name):
    """One folder is untied on the way out, the other was untied before."""
    folder = export(checkpoints[name], tmp_path / "hf", format="sdar")
    mask_id = json.loads((folder / "config.json").read_text())["mask_token_id"]
    weights = load_file(folder / "model.safetensors")
    output_VH, before_VH = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    others = torch.arange(len(output_VH)) != mask_id
    assert torch.allclose(output_VH[mask_id], output_VH[others].double().mean(0).float(), atol=1e-6)
    assert not torch.allclose(output_VH[mask_id], before_VH[mask_id], atol=1e-2)
    if name == "quickstart":
        assert torch.equal(output_VH[others], before_VH[others]), "the other rows are the student's"
    # the worst that a hidden state can do: point where the mask token's row of the embedding does
    hidden_NH = torch.cat([before_VH[mask_id][None], torch.randn(64, output_VH.shape[1])])
    logits_NV = hidden_NH @ output_VH.T
    assert (logits_NV.argmax(-1) != mask_id).all()
    assert (logits_NV.softmax(-1)[:, mask_id] <= 1 / len(output_VH)).all()


def test_whoever_may_read_a_folder_may_read_its_weights(checkpoints, tmp_path):
    folder = export(checkpoints["tiny"], tmp_path / "hf", max_shard_size="50KB")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(list(folder.glob("*.safetensors"))) > 1 and len(modes) == 1


def prompts_of(name: str, vocab_size: int) -> list[Prompt]:
    """Random ones of all lengths modulo the block, or, for the quickstart's model, sums as it has learned them."""
    generator = torch.Generator().manual_seed(6)
    if name != "quickstart":
        lengths = [1 + row % 9 for row in range(NUM_PROMPTS)]
        ids = [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]
    else:
        from megatron_opdlm.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(QUICKSTART)
        sums = [f"{row * 7 % 50} + {row * 13 % 40}" + " - 5" * (row % 3) for row in range(NUM_PROMPTS)]
        ids = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            for text in sums
        ]
    return [Prompt(prompt_id=row, token_ids=tuple(prompt)) for row, prompt in enumerate(ids)]


def engines_responses(checkpoint: Path, rollout: RolloutConfig, prompts: list[Prompt]) -> list[list[int]]:
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    with layout(ParallelConfig()) as groups:
        model, special = load_student(config_of(checkpoint, rollout), groups)
        engine = RolloutEngine(model, rollout, special, seed=1)
        tasks = [RolloutTask(prompt, rollout.max_new_tokens) for prompt in prompts]
        made = engine.generate(tasks, step=0)
    return [t.terminal_ids_T[t.prompt_length :][: t.response_length].tolist() for t in made]


GENERATING = {
    "dynamic": ("quickstart", {}, DYNAMIC),
    "static, as an sdar": ("quickstart", {"format": "sdar"}, {"remasking_strategy": "low_confidence_static"}),
    "dynamic, 3 steps for 8": (
        "tiny",
        {},
        {"dynamic_threshold": 0.15, "block_size": 8, "denoising_steps_per_block": 3},
    ),
    "sequential": ("tiny", {}, {"remasking_strategy": "sequential", "denoising_steps_per_block": 2}),
    "entropy-bounded": ("tiny", {}, {"remasking_strategy": "entropy_bounded"}),
    "shifted logits": ("tiny", {}, {"logit_shift": "next_token", "dynamic_threshold": 0.1}),
    "shifted logits, single tokens": (
        "tiny",
        {},
        {"logit_shift": "next_token", "block_size": 1, "denoising_steps_per_block": 1},
    ),
    "mixture, as an sdar": ("mixture", {"format": "sdar"}, {"dynamic_threshold": 0.15}),
    "qwen2": ("qwen2", {}, {"dynamic_threshold": 0.15}),
}


@pytest.mark.parametrize("case", GENERATING)
def test_its_generate_writes_the_engines_tokens_at_temperature_0(checkpoints, tmp_path, case):
    name, options, settings = GENERATING[case]
    rollout = RolloutConfig(**({"block_size": 4} | settings), temperature=0.0, max_new_tokens=14, stop_token_ids=[5])
    given = {"block_size": rollout.block_size, "stop_token_ids": [5]} | settings
    given.setdefault("denoising_steps_per_block", rollout.denoising_steps_per_block)
    folder = export(checkpoints[name], tmp_path / "hf", with_generate=True, rollout=given, **options)
    prompts = prompts_of(name, 44)
    expected = engines_responses(checkpoints[name], rollout, prompts)
    model = load(folder, with_code=True)
    for prompt, response in zip(prompts, expected, strict=True):
        ids = torch.tensor([prompt.token_ids])
        assert model.generate(ids, max_new_tokens=14)[0].tolist() == [*prompt.token_ids, *response]
    assert len({tuple(response) for response in expected}) > 10, "prompts must not all be answered alike"


def test_padded_prompts_are_decoded_as_if_alone(checkpoints, tmp_path):
    model = load(export(checkpoints["tiny"], tmp_path / "hf", with_generate=True), with_code=True)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    alone = [model.generate(torch.tensor([ids]), max_new_tokens=6)[0, len(ids) :].tolist() for ids in prompts]
    ids = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    both = model.generate(ids, attention_mask=mask, max_new_tokens=6)
    pad = model.generation_config.pad_token_id
    pad = model.generation_config.eos_token_id if pad is None else pad
    for row, response in zip(both, alone, strict=True):
        written = row[5:].tolist()
        assert written[: len(response)] == response and set(written[len(response) :]) <= {pad}


def test_generate_names_a_setting_that_breaks_its_rule(checkpoints, tmp_path):
    model, ids = load(export(checkpoints["tiny"], tmp_path / "hf", with_generate=True), True), torch.tensor([[1]])
    with pytest.raises(ValueError, match=r"denoising_steps \(5\) must be 1 to 4"):
        model.generate(ids, denoising_steps=5)
    with pytest.raises(ValueError, match=r"remasking_strategy \(best\) must be one of"):
        model.generate(ids, remasking_strategy="best")
    with pytest.raises(ValueError, match=r"max_new_tokens \(0\) must be at least 1"):
        model.generate(ids, max_new_tokens=0)


@pytest.mark.parametrize("options", [{}, {"format": "sdar"}], ids=["transformers", "sdar"])
@pytest.mark.parametrize("name", ["quickstart", "mixture"])
def test_a_folder_becomes_a_student_again_with_the_mask_token_it_has(checkpoints, tmp_path, name, options):
    from megatron_opdlm.checkpointing.student_and_teacher import open_student

    folder = export(checkpoints[name], tmp_path / "hf", with_generate=True, **options)
    before = open_student(StudentConfig(checkpoint=str(checkpoints[name])))
    after = open_student(StudentConfig(hf=str(folder)))
    assert after.special == before.special
    assert len(after.tokenizer) == len(before.tokenizer)
    assert after.architecture.vocab_size == before.architecture.vocab_size
    assert after.architecture.is_block_diffusion == bool(options)


def test_settings_are_the_runs_unless_given(checkpoints, tmp_path):
    run = tmp_path / "step_00000007"
    shutil.copytree(checkpoints["tiny"], run)
    rollout = RolloutConfig(block_size=8, denoising_steps_per_block=2, dynamic_threshold=0.7, stop_token_ids=[5])
    save_config(tiny_config(Path("from-here"), rollout=rollout), run / "config.yaml")
    folder = export(run, tmp_path / "hf", rollout={"dynamic_threshold": 0.6})
    values, generation = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert (values["block_size"], generation["block_length"], generation["denoising_steps"]) == (8, 8, 2)
    assert generation["dynamic_threshold"] == 0.6 and generation["eos_token_id"][-1] == 5
    card = (folder / "README.md").read_text()
    assert "from-here, trained for 7 steps" in card
    assert "From dynamic_threshold given at export, the rest from the run's config.yaml" in card


def test_settings_survive_the_way_through_a_checkpoint_that_no_run_wrote(checkpoints, tmp_path):
    from megatron_opdlm.checkpointing.conversion import hf_to_megatron

    given = {"block_size": 8, "denoising_steps_per_block": 2, "logit_shift": "next_token"}
    first = export(checkpoints["tiny"], tmp_path / "first", rollout=given)
    with layout(ParallelConfig()):
        hf_to_megatron(str(first), tmp_path / "student", role="student", dtype=None, mask_token=MASK_TOKEN)
    second = export(tmp_path / "student", tmp_path / "second", rollout={})
    for name in ("config.json", "generation_config.json"):
        assert json.loads((first / name).read_text()) == json.loads((second / name).read_text())
    first_weights, second_weights = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(tensor, second_weights[name]) for name, tensor in first_weights.items())


def test_a_published_sdar_leaves_as_one_with_code_of_ours_or_as_a_qwen3_without(checkpoints, tmp_path):
    own = export(checkpoints["sdar"], tmp_path / "own")
    assert "must not run" not in "".join(path.read_text() for path in own.glob("mod*.py"))
    assert load(own, with_code=True).config.model_type == "sdar"
    plain = export(checkpoints["sdar"], tmp_path / "plain", format="transformers")
    assert not list(plain.glob("modeling_*.py")) and load(plain, with_code=False).config.model_type == "qwen3"


def spoilt(path: Path) -> None:
    """One bit of one tensor flips."""
    tensors = load_file(path)
    next(iter(tensors.values())).view(torch.int32).view(-1)[7] ^= 1
    save_file(tensors, path)


def test_a_file_that_does_not_hold_what_was_meant_is_found_and_nothing_is_left(checkpoints, tmp_path):
    from megatron_opdlm.export import hf_package

    write = hf_package.write_hf_folder

    def write_badly(folder, destination, **options):
        write(folder, destination, **options)
        spoilt(destination / "model.safetensors")

    with (
        mock.patch.object(hf_package, "write_hf_folder", write_badly),
        pytest.raises(ValueError, match="is not what was written"),
    ):
        export(checkpoints["tiny"], tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))


def test_a_config_that_says_something_else_is_found_and_nothing_is_left(checkpoints, tmp_path):
    from megatron_opdlm.export import hf_package

    def other_values(values, *rest):
        return values | {"rms_norm_eps": 1e-3}

    with (
        mock.patch.object(hf_package, "config_values", other_values),
        pytest.raises(ValueError, match=r"reading the files again: config\.json says"),
    ):
        export(checkpoints["tiny"], tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))


REFUSED = {
    "no block size": ("tiny", {"with_generate": True, "rollout": {}}, "--with-generate needs --rollout.block_size"),
    "no block size, sdar": ("tiny", {"format": "sdar", "rollout": {}}, "--format sdar needs --rollout.block_size"),
    "half the settings": ("tiny", {"rollout": {"dynamic_threshold": 0.5}}, "rollout.block_size must be given"),
    "steps": ("tiny", {"rollout": {"block_size": 2}}, r"rollout.denoising_steps_per_block \(4\) must not exceed"),
    "threshold": ("tiny", {"rollout": {"block_size": 4, "dynamic_threshold": 2.0}}, "rollout.dynamic_threshold"),
    "stop token": ("tiny", {"rollout": {"block_size": 4, "stop_token_ids": [99]}}, r"stop_token_ids \(99\) must be"),
    "shifted sdar": (
        "tiny",
        {"format": "sdar", "rollout": {"block_size": 4, "logit_shift": "next_token"}},
        "--format sdar cannot hold a student of rollout.logit_shift next_token",
    ),
    "biased sdar": ("qwen2", {"format": "sdar"}, "no place for the biases of a qwen2"),
    "size": ("tiny", {"max_shard_size": "much"}, "--max-shard-size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(checkpoints, tmp_path, case):
    name, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        export(checkpoints[name], tmp_path / "hf", **options)
    assert not list(tmp_path.glob("hf*"))


def test_a_teacher_goes_out_without_decoding_and_is_no_sdar(checkpoints, tmp_path):
    from megatron_opdlm.checkpointing.conversion import hf_to_megatron

    source = checkpoints["tiny"].with_name("tiny-hf")
    with layout(ParallelConfig()):
        hf_to_megatron(str(source), tmp_path / "teacher", role="teacher", dtype=None, mask_token=MASK_TOKEN)
    folder = export(tmp_path / "teacher", tmp_path / "hf", rollout={})
    values, before = (json.loads((place / "config.json").read_text()) for place in (folder, source))
    assert values == {"rope_theta": 1e6} | before
    with pytest.raises(ValueError, match="--format sdar needs a mask token"):
        export(tmp_path / "teacher", tmp_path / "hf2", format="sdar", rollout={})
    with pytest.raises(ValueError, match=r"rollout.block_size is given, but .* has no mask token"):
        export(tmp_path / "teacher", tmp_path / "hf2")
