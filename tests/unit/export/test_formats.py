"""What the JSON files of an exported folder say, for each format and family, against literals."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.export.formats import (
    FORMATS,
    config_values,
    family_of,
    generation_values,
    is_served_alike,
    sglang_values,
)
from megatron_opdlm.export.hf_package import shard_bytes
from megatron_opdlm.export.serving import Serving
from megatron_opdlm.models.qwen3 import Mixture, Qwen3Architecture

ARCHITECTURE = Qwen3Architecture(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    vocab_size=50,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    dtype="bfloat16",
    mask_token_id=49,
)
IN_TRANSFORMERS_5 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "tie_word_embeddings": True,
    "mask_token_id": 49,
}


def serving(**rollout) -> Serving:
    return Serving(49, (7, 8), RolloutConfig(**({"block_size": 8, "denoising_steps_per_block": 8} | rollout)), "a test")


@pytest.mark.parametrize(
    ("model_type", "kind", "expected"),
    [
        ("qwen3", None, ("qwen3", "Qwen3ForCausalLM")),
        ("qwen2", None, ("qwen2", "Qwen2ForCausalLM")),
        ("qwen3_moe", "transformers", ("qwen3_moe", "Qwen3MoeForCausalLM")),
        ("qwen3", "sdar", ("sdar", "SDARForCausalLM")),
        ("qwen3_moe", "sdar", ("sdar_moe", "SDARMoeForCausalLM")),
        ("sdar", None, ("sdar", "SDARForCausalLM")),
        ("sdar_moe", None, ("sdar_moe", "SDARMoeForCausalLM")),
        ("sdar", "transformers", ("qwen3", "Qwen3ForCausalLM")),
        ("sdar_moe", "transformers", ("qwen3_moe", "Qwen3MoeForCausalLM")),
    ],
)
def test_a_model_goes_out_as_the_family_that_its_format_has_for_it(model_type, kind, expected):
    family = family_of(model_type, kind)
    assert (family.model_type, family.architecture) == expected
    assert family.is_sdar == expected[0].startswith("sdar")


def test_biases_have_no_place_in_an_sdar():
    with pytest.raises(ValueError, match="--format sdar has no place for the biases of a qwen2"):
        family_of("qwen2", "sdar")


def test_an_sdars_config_has_the_keys_and_spellings_of_the_published_ones():
    values = config_values(IN_TRANSFORMERS_5, ARCHITECTURE, family_of("qwen3", "sdar"), serving(), with_code=True)
    assert values == {
        "model_type": "sdar",
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "torch_dtype": "bfloat16",
        "rope_theta": 1e6,
        "head_dim": 12,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "mask_token_id": 49,
        "block_size": 8,
        "logit_shift": "none",
    }


def test_a_mixture_names_its_experts_as_servers_look_for_them():
    mixture = Mixture(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
    architecture = dataclasses.replace(ARCHITECTURE, mixture=mixture)
    before = IN_TRANSFORMERS_5 | {"model_type": "qwen3_moe", "num_local_experts": 4}
    values = config_values(before, architecture, family_of("qwen3_moe", "sdar"), serving(), with_code=True)
    assert "num_local_experts" not in values
    assert (values["num_experts"], values["decoder_sparse_step"], values["mlp_only_layers"]) == (4, 1, [])
    plain = config_values(before, architecture, family_of("qwen3_moe", "transformers"), serving(), with_code=False)
    assert plain["num_experts"] == plain["num_local_experts"] == 4, "for transformers 4 and 5"


def test_a_plain_folder_keeps_its_config_and_says_besides_how_it_decodes():
    family = family_of("qwen3", "transformers")
    in_both_releases = IN_TRANSFORMERS_5 | {"rope_theta": 1e6}
    added = {"block_size": 8, "logit_shift": "next_token"}
    shifted = serving(logit_shift="next_token")
    assert config_values(IN_TRANSFORMERS_5, ARCHITECTURE, family, shifted, False) == in_both_releases | added
    assert config_values(IN_TRANSFORMERS_5, ARCHITECTURE, family, None, False) == in_both_releases
    coded = config_values(IN_TRANSFORMERS_5, ARCHITECTURE, family, shifted, True)
    assert coded["auto_map"] == {"AutoModelForCausalLM": "modeling_block_diffusion.Qwen3BlockDiffusionLM"}


def test_code_that_a_model_came_with_is_not_pointed_to():
    before = IN_TRANSFORMERS_5 | {"model_type": "sdar", "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"}}
    values = config_values(before, ARCHITECTURE, family_of("sdar", "transformers"), serving(), with_code=False)
    assert "auto_map" not in values and values["model_type"] == "qwen3"


def test_the_generation_config_names_end_tokens_and_decoding_and_keeps_the_rest():
    before = {"_from_model_config": True, "eos_token_id": 3, "temperature": 0.6}
    values = generation_values(before, serving(dynamic_threshold=0.8))
    assert values == {
        "eos_token_id": [7, 8],
        "temperature": 0.6,
        "block_length": 8,
        "denoising_steps": 8,
        "remasking_strategy": "low_confidence_dynamic",
        "dynamic_threshold": 0.8,
        "eb_threshold": 0.35,
    }


@pytest.mark.parametrize(
    ("rollout", "threshold", "is_alike"),
    [
        ({"dynamic_threshold": 0.8}, 0.8, True),
        ({"remasking_strategy": "low_confidence_static"}, 1.0, True),
        ({"dynamic_threshold": 0.8, "denoising_steps_per_block": 4}, 0.8, False),
        ({"remasking_strategy": "sequential"}, 1.0, False),
    ],
)
def test_sglangs_settings_are_the_students_where_it_can_follow_them(rollout, threshold, is_alike):
    assert sglang_values(serving(**rollout)) == {"block_size": 8, "threshold": threshold}
    assert is_served_alike(serving(**rollout)) is is_alike


@pytest.mark.parametrize(("size", "expected"), [("5GB", 5_000_000_000), ("200mb", 200_000_000), ("1KB", 1000)])
def test_sizes_of_files_are_counted_as_hugging_face_counts(size, expected):
    assert shard_bytes(size) == expected


@pytest.mark.parametrize("size", ["5", "0GB", "-1GB", "1.5GB", "GB", "5 GB", "5GiB"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match=r"--max-shard-size \(.*\) must be a whole number"):
        shard_bytes(size)


def test_the_command_line_offers_the_formats():
    from tools.convert_megatron_to_hf import build_parser

    (action,) = (action for action in build_parser()._actions if action.dest == "format")
    assert action.choices == FORMATS
