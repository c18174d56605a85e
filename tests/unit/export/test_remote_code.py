"""The code in exported folders: it stands alone, and its strategies are those of `diffusion.remasking`."""

from __future__ import annotations

import ast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_opdlm.diffusion.blocks import commit_schedule
from megatron_opdlm.diffusion.remasking import REMASKING_STRATEGIES, select_commits
from megatron_opdlm.export.hf_package import CODE
from megatron_opdlm.export.remote_code.modeling_block_diffusion import STRATEGIES, BlockDiffusion, Decoding, select

VALUES = [0.0, 0.1, 0.5, 0.5, 0.9, 0.91, 1.0]
"""Few, so that there are ties and values at a threshold."""


def test_it_needs_torch_and_transformers_alone():
    for path in CODE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in ("torch", "transformers") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                is_beside = node.level == 1 and (CODE / f"{node.module}.py").is_file()
                assert is_beside or node.module.split(".")[0] in ("torch", "transformers", "dataclasses")


def test_it_knows_every_strategy():
    assert list(STRATEGIES) == list(REMASKING_STRATEGIES)


@given(st.data())
def test_a_step_commits_what_the_rollout_commits(data):
    size = data.draw(st.integers(1, 6))
    numbers = st.lists(st.sampled_from(VALUES), min_size=size, max_size=size)
    confidence, entropy = torch.tensor(data.draw(numbers)), torch.tensor(data.draw(numbers))
    is_masked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    steps = data.draw(st.integers(1, size))
    step = data.draw(st.integers(0, steps - 1))
    strategy, bound = data.draw(st.sampled_from(list(STRATEGIES))), data.draw(st.sampled_from([0.0, 0.6, 2.0]))
    decoding = Decoding(
        block_length=size,
        denoising_steps=steps,
        remasking_strategy=strategy,
        dynamic_threshold=0.9,
        eb_threshold=bound,
    )
    expected = select_commits(
        strategy,
        confidence[None],
        is_masked[None],
        commit_schedule(size, steps)[[step]],
        torch.tensor([step == steps - 1]),
        dynamic_threshold=0.9,
        entropy_BK=entropy[None],
        entropy_bound=bound,
    )[0]
    assert torch.equal(select(decoding, step, confidence, entropy, is_masked), expected)


class Stub(BlockDiffusion):
    """A model of five tokens, of which the last is the mask token, and nothing else."""

    class config:
        mask_token_id = 4
        logit_shift = "next_token"


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 9.0]])


def test_the_mask_token_is_never_drawn_and_takes_no_part_in_the_confidence():
    drawn, confidence, entropy = Stub()._draw(LOGITS.clone(), Decoding(), None)
    assert drawn.tolist() == [0] and entropy.tolist() == [0.0]
    torch.testing.assert_close(confidence, LOGITS[:, :4].softmax(-1)[:, 0])


@pytest.mark.parametrize(
    ("settings", "probabilities"),
    [
        ({"temperature": 0.5}, (LOGITS[0, :4] / 0.5).softmax(0)),
        ({"temperature": 1.0, "top_k": 2}, LOGITS[0, :2].softmax(0)),
        ({"temperature": 1.0, "top_p": 0.8}, LOGITS[0, :2].softmax(0)),  # 0.64 and 0.24: the second one reaches 0.8
        ({"temperature": 1.0, "top_p": 0.6}, torch.ones(1)),
    ],
)
def test_draws_follow_the_filtered_distribution_and_confidences_the_raw_one(settings, probabilities):
    generator = torch.Generator().manual_seed(0)
    many = LOGITS.expand(4000, 5).clone()
    drawn, confidence, entropy = Stub()._draw(many, Decoding(**settings), generator)
    shares = torch.bincount(drawn, minlength=len(probabilities)) / len(drawn)
    assert len(shares) == len(probabilities), "no token that the filters leave out"
    assert (shares - probabilities).abs().max() < 0.03
    torch.testing.assert_close(confidence, LOGITS[0, :4].softmax(0)[drawn])
    expected = torch.distributions.Categorical(probabilities).entropy()
    torch.testing.assert_close(entropy, expected.expand_as(entropy).float(), atol=1e-5, rtol=0)


def test_shifted_logits_come_from_the_position_before_also_when_that_is_read_no_more():
    rows = torch.arange(5.0)[:, None]
    first, kept = Stub()._predicting(rows, None, 4)
    assert first.flatten().tolist() == [0, 1, 2, 3]
    later, kept = Stub()._predicting(rows[1:] + 10, kept, 4)
    assert later.flatten().tolist() == [0, 11, 12, 13]
