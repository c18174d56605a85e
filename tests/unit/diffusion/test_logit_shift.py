"""Which output predicts which position, against a literal table."""

from __future__ import annotations

import torch

from megatron_opdlm.diffusion.logit_shift import predicting_outputs, predicting_outputs_of_streams

# Outputs are named by their stream and position: 10 + i clean, 20 + i noisy; two rows, the second with 100 more.
CLEAN_BTH = torch.tensor([[[10 + i] for i in range(6)], [[110 + i] for i in range(6)]])
NOISY_BTH = CLEAN_BTH + 10
EXPECTED = {  # position -> the output that predicts it, by block size
    3: {1: 20, 2: 21, 3: 12, 4: 23, 5: 24},
    2: {1: 20, 2: 11, 3: 22, 4: 13, 5: 24},
    1: {1: 10, 2: 11, 3: 12, 4: 13, 5: 14},
}


def test_shifted_logits_come_from_the_left_neighbour_and_before_a_block_from_the_clean_stream():
    for block_size, expected in EXPECTED.items():
        shifted = predicting_outputs_of_streams(CLEAN_BTH, NOISY_BTH, block_size, "next_token")
        assert shifted.shape == NOISY_BTH.shape
        for position, output in expected.items():
            assert shifted[:, position, 0].tolist() == [output, output + 100]


def test_without_a_shift_each_noisy_output_predicts_its_own_position():
    assert predicting_outputs_of_streams(CLEAN_BTH, NOISY_BTH, 3, "none") is NOISY_BTH


def test_a_single_block_needs_the_output_before_it():
    own, before = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[8.0], [9.0]])
    assert predicting_outputs(own, before, "next_token").tolist() == [[[8.0], [1.0]], [[9.0], [3.0]]]
