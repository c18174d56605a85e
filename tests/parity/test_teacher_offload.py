"""A teacher in host memory teaches the same, and takes the device's memory for its forward alone."""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.config.schema import ParallelConfig
from tests.parity import test_gradients
from tests.parity.test_gradients import make_trainer, megatron_gradients, roll_out_states
from tests.worlds import layout

folders = test_gradients.folders  # fixture


def resident_names(model) -> set[str]:
    """Parameters that have memory on the device."""
    return {name for name, weight in model.named_parameters() if weight.untyped_storage().nbytes() > 0}


@pytest.mark.parametrize(("tie", "stays"), [(False, "output_layer.weight"), (True, "embedding.word_embeddings.weight")])
def test_gradients_are_the_same_to_the_bit_and_memory_is_free_outside_the_forward(
    folders, world_of_one, tmp_path, monkeypatch, tie, stays
):
    from megatron_opdlm.models.build import Qwen3Model
    from megatron_opdlm.objectives import on_policy_distillation

    folders = folders | {"teacher": folders[tie]}
    forward, loss = Qwen3Model.forward, on_policy_distillation.distillation_loss
    in_teachers_forward, in_students_forward, in_loss = [], [], []
    with layout(ParallelConfig()):
        plain = make_trainer(folders, tmp_path / "plain", {"micro_batch_size": 2})
        states = roll_out_states(plain)
        expected, expected_sums = megatron_gradients(plain, states)
        trainer = make_trainer(folders, tmp_path / "offload", {"micro_batch_size": 2, "offload": True})
        teacher = trainer.objective.teacher

        def noting_forward(chunk, *arguments):
            seen = in_teachers_forward if chunk in teacher.chunks else in_students_forward
            seen.append(resident_names(teacher))
            return forward(chunk, *arguments)

        def noting_loss(*arguments):
            in_loss.append(resident_names(teacher))
            return loss(*arguments)

        monkeypatch.setattr(Qwen3Model, "forward", noting_forward)
        monkeypatch.setattr(on_policy_distillation, "distillation_loss", noting_loss)
        actual, sums = megatron_gradients(trainer, states)
    assert sums == expected_sums
    for name, gradient in expected.items():
        assert actual[name].equal(gradient), name
    everything = {name for name, _ in teacher.named_parameters()}
    assert len(everything) > 10
    assert in_teachers_forward == [everything] * 2
    assert in_students_forward == in_loss == [{stays}] * 2


def test_a_call_of_an_offloaded_model_brings_its_weights_along(folders, world_of_one, tmp_path):
    ids, positions = torch.arange(8)[None], torch.arange(8)
    with layout(ParallelConfig()):
        plain, hosted = (
            make_trainer(folders, tmp_path / str(offload), {"micro_batch_size": 2, "offload": offload})
            for offload in (False, True)
        )
        assert hosted.objective.teacher(ids, positions, None).equal(plain.objective.teacher(ids, positions, None))
    assert resident_names(hosted.objective.teacher) == {"output_layer.weight"}
