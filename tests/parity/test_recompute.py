"""What the student's forward keeps for the backward pass under each `training.recompute`.

That no gradient changes is shown by `test_gradients` and, for every attention back end, `test_gradients_of_backends`.
"""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.config.schema import ParallelConfig, TrainingConfig
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, load_student, tiny_config

NUM_ROWS, LENGTH, HIDDEN_SIZE, NUM_HEADS = 2, 32, 32, 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("hf")
    return {num: make_tiny_qwen3(root / f"{num} layers", num_layers=num) for num in (1, 3)}


def kept_bytes(folder, recompute: str) -> int:
    """Memory of the tensors that autograd holds after a forward over a clean and a noisy stream, weights left out."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    config = tiny_config(folder, training=TrainingConfig(recompute=recompute))
    with layout(ParallelConfig()) as groups:
        model, _ = load_student(config, groups)
        (chunk,) = model.chunks
        chunk.train()
        ids = torch.arange(2 * NUM_ROWS * LENGTH).view(2 * NUM_ROWS, LENGTH) % 40
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = chunk(ids, torch.arange(LENGTH), torch.tensor([LENGTH, LENGTH - 5]))
    assert hidden.requires_grad
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def test_full_recompute_keeps_one_hidden_state_a_layer(folders, world_of_one):
    hidden_state = 2 * NUM_ROWS * LENGTH * HIDDEN_SIZE * 4
    assert kept_bytes(folders[3], "full") - kept_bytes(folders[1], "full") == 2 * hidden_state
    assert kept_bytes(folders[3], "none") - kept_bytes(folders[1], "none") > 2 * 10 * hidden_state


def test_selective_recompute_does_not_keep_attention_probabilities(folders, world_of_one):
    saved = kept_bytes(folders[3], "none") - kept_bytes(folders[3], "selective")
    assert saved > 3 * NUM_ROWS * NUM_HEADS * LENGTH * LENGTH * 4
    assert kept_bytes(folders[3], "selective") > 2 * kept_bytes(folders[3], "full")
