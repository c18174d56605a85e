"""Which training step counts as the best, by sequences of accuracies written by hand."""

from __future__ import annotations

import pytest

from megatron_opdlm.config.load import load_config
from megatron_opdlm.training.validation import best_step_of


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        ([], None),
        ([0.0], 10),
        ([0.1, 0.5, 0.3], 20),
        ([0.1, 0.3, 0.5], 30),
        ([0.5, 0.5, 0.5], 10),
        ([0.2, 0.5, 0.4, 0.5], 20),
    ],
)
def test_the_best_step_has_the_highest_accuracy_and_is_the_earliest_of_several(accuracies, best):
    history = [(10 * place, accuracy) for place, accuracy in enumerate(accuracies, start=1)]
    assert best_step_of(history) == best
    assert best_step_of(history[::-1]) == best, "whatever the order"


def test_an_evaluation_while_training_needs_tasks_that_exist(tmp_path):
    flags = ["--evaluation.interval", "5"]
    with pytest.raises(ValueError, match=r"give evaluation\.files, at least one file"):
        load_config(flags, required=["validation"])
    with pytest.raises(ValueError, match=r"evaluation\.files: there is no file"):
        load_config([*flags, "--evaluation.files", str(tmp_path / "absent")], required=["validation"])
    with pytest.raises(ValueError, match=r"evaluation\.interval \(-1\) must be at least 0"):
        load_config(["--evaluation.interval", "-1"])
    load_config([], required=["validation"])
