"""Rows that are dealt out over ranks arrive as they were, and training on them gives the same weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainingConfig,
)
from megatron_opdlm.diffusion.states import OnPolicyStates
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, tiny_config

LENGTHS = [[8, 4, 16, 3], [20, 12, 7, 16], [1, 24, 5, 16]]
"""Of three ranks. The two global batches take two rows of each."""
RANKS = [[[1, 24], [16, 3]], [[20, 4], [7, 16]], [[8, 12], [5, 16]]]
"""Where they are trained: by rank and global batch."""

MICRO_BATCH_SIZES = (1, 2)
ROWS_PER_RANK = 4
"""Of a global batch, in training on two ranks."""
SAME_NUMBERS = ("train/loss", "train/grad_norm", "train/teacher_agreement", "train/on_policy_gap", "train/lr")
SAME_COUNTS = ("rollout/tokens", "rollout/tokens_per_step", "rollout/end_token_fraction", "train/trained_tokens")


def row_of(length: int, batch: int) -> dict[str, torch.Tensor]:
    """A row that cannot be mistaken for another one, drawn from its length and its global batch."""
    generator = torch.Generator().manual_seed(100 * length + batch)
    clean, noisy, flags = torch.randint(0, 2**40, (3, length), generator=generator)
    return {
        "clean_ids_BT": clean,
        "noisy_ids_BT": noisy,
        "is_trained_BT": flags % 2 == 0,
        "is_committed_BT": flags % 3 == 0,
        "log_probs_BT": torch.randn(length, generator=generator),
    }


def states_of(rank: int) -> OnPolicyStates:
    lengths = LENGTHS[rank]
    rows = [row_of(length, place // 2) for place, length in enumerate(lengths)]
    columns = {name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}
    return OnPolicyStates(lengths_B=torch.tensor(lengths), **columns)


def deal_out(rank: int) -> tuple[OnPolicyStates, list[tuple[float, float]], bool]:
    """This rank's rows afterwards, the imbalances, and whether rows stay with balancing off."""
    from megatron_opdlm.training.balance import balance_rows

    settings = {"global_batch_size": 6, "pad_to_multiple": 1}
    states = states_of(rank)
    balanced, imbalances = balance_rows(states, TrainingConfig(**settings), dist.group.WORLD)
    kept, without = balance_rows(states, TrainingConfig(**settings, balance_rows=False), dist.group.WORLD)
    assert [i.after for i in without] == [i.before for i in without]
    return balanced, [(i.before, i.after) for i in imbalances], kept is states


@pytest.fixture(scope="module")
def three_ranks() -> list[tuple]:
    return run_on_ranks(deal_out, 3)


def test_rows_arrive_intact_at_their_ranks(three_ranks):
    for (states, _, _), batches in zip(three_ranks, RANKS, strict=True):
        assert [states.lengths_B[:2].tolist(), states.lengths_B[2:].tolist()] == batches
        for place, length in enumerate(states.lengths_B.tolist()):
            for name, expected in row_of(length, place // 2).items():
                actual = getattr(states, name)[place]
                assert actual[:length].equal(expected) and actual.dtype == expected.dtype, name
                assert not actual[length:].any(), f"{name}: padding"


def test_imbalance_is_the_busiest_rank_over_the_mean(three_ranks):
    for _, imbalances, keeps_rows_when_off in three_ranks:
        assert imbalances == [pytest.approx((32 / 23, 25 / 23)), pytest.approx((23 / 21, 23 / 21))]
        assert keeps_rows_when_off


def train_all(rank: int, root: Path) -> dict[tuple[bool, int], tuple[list[list[list]], dict]]:
    return {(on, size): train(root, on, size) for on in (False, True) for size in MICRO_BATCH_SIZES}


def train(root: Path, balance: bool, micro_batch_size: int) -> tuple[list[list[list]], dict]:
    """This rank's micro-batches (rows as text, and their width) by optimizer step, and its trajectories."""
    from megatron_opdlm.training.trainer import Trainer

    config = tiny_config(
        root / "student",
        teacher=root / "teacher",
        parallel=ParallelConfig(),
        backend="aten",
        rollout=RolloutConfig(max_new_tokens=8, dynamic_threshold=0.12),
        data=DataConfig(train_files=[str(root / "prompts.jsonl")]),
        # The epsilon is far above rounding noise in a gradient and far below the gradients, as in the invariance test.
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_warmup_steps=1, adam_eps=1e-5),
        training=TrainingConfig(
            max_steps=3,
            num_prompts_per_step=16,
            global_batch_size=2 * ROWS_PER_RANK,
            micro_batch_size=micro_batch_size,
            pad_to_multiple=4,
            balance_rows=balance,
        ),
        checkpoint=CheckpointConfig(save_interval=0),
        logging=LoggingConfig(directory=str(run_folder(root, balance, micro_batch_size)), progress_bar=False),
    )
    with layout(config.parallel):
        trainer = Trainer(config)
        trained, trajectories = [], {}
        train_step, generate = trainer.train_step, trainer.engine.generate

        def noting_train_step(micro_batches):
            trained.append([(rows_as_text(states), states.clean_ids_BT.shape[1]) for states in micro_batches])
            return train_step(micro_batches)

        def noting_generate(tasks, step, dynamic_threshold):
            made = generate(tasks, step, dynamic_threshold)
            trajectories.update({(step, t.prompt_id, t.sample_index): t.to_json() for t in made})
            return made

        trainer.train_step, trainer.engine.generate = noting_train_step, noting_generate
        trainer.run()
    return trained, trajectories


def run_folder(root: Path, balance: bool, micro_batch_size: int) -> Path:
    return root / f"{'balanced' if balance else 'as rolled out'}, micro-batch {micro_batch_size}"


def rows_as_text(states: OnPolicyStates) -> list[str]:
    rows = zip(states.clean_ids_BT, states.noisy_ids_BT, states.is_trained_BT, states.lengths_B, strict=True)
    return [json.dumps([values_T[:length].tolist() for values_T in row]) for *row, length in rows]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("balance")
    make_tiny_qwen3(root / "student", seed=1)
    make_tiny_qwen3(root / "teacher", seed=3)
    write_prompts(root / "prompts.jsonl", 20)
    return root


@pytest.fixture(scope="module")
def two_ranks(root) -> list[dict]:
    return run_on_ranks(train_all, 2, root)


def metrics_of(root: Path, balance: bool, micro_batch_size: int) -> list[dict]:
    lines = (run_folder(root, balance, micro_batch_size) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def tokens_by_step(two_ranks: list[dict], balance: bool, size: int) -> list[list[int]]:
    """Tokens that each rank trained, padding included, by optimizer step."""
    by_rank = [
        [sum(len(rows) * width for rows, width in step) for step in rank[balance, size][0]] for rank in two_ranks
    ]
    return list(zip(*by_rank, strict=True))


@pytest.mark.parametrize("size", MICRO_BATCH_SIZES)
def test_every_global_batch_keeps_its_rows(two_ranks, size):
    rows = {on: [rank[on, size][0] for rank in two_ranks] for on in (False, True)}
    num_moved = 0
    for before, after in zip(zip(*rows[False], strict=True), zip(*rows[True], strict=True), strict=True):
        expected, actual = (
            [Counter(row for rows, _ in rank for row in rows) for rank in ranks] for ranks in (before, after)
        )
        assert [rank.total() for rank in actual] == [ROWS_PER_RANK] * 2
        assert actual[0] + actual[1] == expected[0] + expected[1]
        num_moved += (actual[0] - expected[0]).total()
    assert num_moved, "otherwise nothing was balanced"


@pytest.mark.parametrize("size", MICRO_BATCH_SIZES)
def test_metrics_tell_the_imbalance_with_and_without(two_ranks, root, size):
    before, after = (tokens_by_step(two_ranks, on, size) for on in (False, True))
    for step, metrics in enumerate(metrics_of(root, True, size)):
        batches = range(2 * step, 2 * step + 2)
        expected_before = mean(max(before[batch]) / mean(after[batch]) for batch in batches)
        expected = mean(max(after[batch]) / mean(after[batch]) for batch in batches)
        assert metrics["train/token_imbalance_before"] == pytest.approx(expected_before)
        assert metrics["train/token_imbalance"] == pytest.approx(expected)
        assert expected <= expected_before
    for metrics in metrics_of(root, False, size):
        assert metrics["train/token_imbalance_before"] == metrics["train/token_imbalance"]


@pytest.mark.parametrize("size", MICRO_BATCH_SIZES)
def test_the_rollouts_are_identical(two_ranks, size):
    for rank in two_ranks:
        expected, actual = ({key: json.loads(line) for key, line in rank[on, size][1].items()} for on in (False, True))
        assert actual.keys() == expected.keys() and len(expected) == 3 * 16 / 2
        for key, trajectory in expected.items():
            for name, value in trajectory.items():
                assert actual[key][name] == (pytest.approx(value, abs=1e-4) if "log_probs" in name else value), name


@pytest.mark.parametrize("size", MICRO_BATCH_SIZES)
def test_loss_and_counts_are_equal(two_ranks, root, size):
    for expected, actual in zip(metrics_of(root, False, size), metrics_of(root, True, size), strict=True):
        for name in SAME_NUMBERS:
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
        for name in SAME_COUNTS:
            assert actual[name] == expected[name], name


@pytest.mark.parametrize("size", MICRO_BATCH_SIZES)
def test_weights_after_three_steps_are_equal(two_ranks, root, size):
    from safetensors.torch import load_file

    expected, actual = (exported(root, on, size) for on in (False, True))
    start = load_file(root / "student" / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        difference = (actual[name] - weight).norm()
        assert difference <= 1e-6 * weight.norm(), name
        assert difference <= 1e-3 * (weight - start[name].double()).norm(), f"{name}: relative to what training changed"


def exported(root: Path, balance: bool, size: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    output = root / f"exported {balance} {size}"
    megatron_to_hf(run_folder(root, balance, size) / "checkpoints", output, dtype=None)
    return {name: tensor.double() for name, tensor in load_file(output / "model.safetensors").items()}
