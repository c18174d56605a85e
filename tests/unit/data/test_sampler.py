"""The order in which prompts are used."""

from __future__ import annotations

import doctest
import json

import pytest

from megatron_opdlm.data import sampler
from megatron_opdlm.data.sampler import PromptStream, shuffled_indices


def draw(stream: PromptStream, num_batches: int) -> list[int]:
    return [index for _ in range(num_batches) for index in stream.next_batch()]


def test_the_example_in_the_docstring_is_true():
    result = doctest.testmod(sampler)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(("num_prompts", "batch_size"), [(10, 5), (10, 4), (7, 3), (3, 8), (1, 2)])
def test_every_prompt_comes_exactly_once_per_epoch(num_prompts, batch_size):
    indices = draw(PromptStream(num_prompts, batch_size, seed=1), num_prompts * 3)
    epochs = [indices[start : start + num_prompts] for start in range(0, len(indices), num_prompts)]
    assert len(epochs) == 3 * batch_size
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs)


def test_epochs_and_seeds_are_shuffled_differently():
    stream = PromptStream(50, 50, seed=1)
    first, second = stream.next_batch(), stream.next_batch()
    assert first != second and first != list(range(50))
    assert PromptStream(50, 50, seed=2).next_batch() != first
    assert PromptStream(50, 50, seed=1).next_batch() == first


def test_the_order_never_changes_from_one_version_to_another():
    assert shuffled_indices(8, seed=1234, epoch=0) == [2, 3, 7, 0, 5, 6, 4, 1]


def test_every_place_of_an_epoch_is_equally_likely():
    places = [shuffled_indices(4, seed=7, epoch=epoch).index(0) for epoch in range(1000)]
    assert all(200 < places.count(place) < 300 for place in range(4))


def test_a_batch_larger_than_the_data_takes_several_epochs():
    stream = PromptStream(3, 8, seed=1)
    batch = stream.next_batch()
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2] and len(batch) == 8
    assert stream.epoch == 2


@pytest.mark.parametrize("num_before", [0, 1, 2, 3, 7])
def test_defect_8_a_resumed_stream_goes_on_with_the_identical_order(num_before):
    whole = draw(PromptStream(10, 4, seed=5), num_before + 9)
    stopped = PromptStream(10, 4, seed=5)
    before = draw(stopped, num_before)
    resumed = PromptStream(10, 4, seed=5)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert before + draw(resumed, 9) == whole


def test_defect_8_loading_into_a_used_stream_does_not_keep_its_order():
    other = PromptStream(10, 4, seed=5)
    state = other.state_dict()
    expected = draw(PromptStream(10, 4, seed=5), 3)
    draw(other, 4)
    other.load_state_dict(state)
    assert draw(other, 3) == expected


def test_a_stream_may_resume_with_another_batch_size():
    stopped = PromptStream(10, 4, seed=5)
    before = draw(stopped, 2)
    resumed = PromptStream(10, 6, seed=5)
    resumed.load_state_dict(stopped.state_dict())
    assert before + draw(resumed, 2) == draw(PromptStream(10, 4, seed=5), 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"extra": 1}, "must have the keys"),
        (lambda state: {"num_prompts": 10, "seed": 5}, "must have the keys"),
        (lambda state: state | {"num_prompts": 11}, r"data\.train_files has 10 prompts.*written with 11"),
        (lambda state: state | {"seed": 6}, r"training\.seed is 5.*written with 6"),
    ],
)
def test_a_state_of_another_stream_is_refused(change, message):
    stream = PromptStream(10, 4, seed=5)
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict(change(stream.state_dict()))


@pytest.mark.parametrize(("num_prompts", "batch_size"), [(0, 1), (1, 0)])
def test_a_stream_with_nothing_to_draw_is_refused(num_prompts, batch_size):
    with pytest.raises(AssertionError):
        PromptStream(num_prompts, batch_size, seed=1)
