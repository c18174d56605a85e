"""Ranks that share sequences attend, predict and train as one process does.

Attention is compared in float64, whole sequences against parts; training runs are whole `Trainer`s, as in
`test_train_step_invariance`, and the reference is the run of one process.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.config.schema import DataConfig, ParallelConfig, RolloutConfig, StudentConfig, TrainingConfig
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.diffusion.trajectory import Trajectory
from tests.distributed.test_pipeline import evaluate
from tests.distributed.test_train_step_invariance import SAME_COUNTS, SAME_NUMBERS, Run, read_weights, train
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import CONTEXT_LAYOUTS, model_ranks

WRONG = Run(2, "context parallel 2", 2)
"""Each rank takes the mean over the trained positions of its own part."""
REFERENCES = [
    Run(1, "tensor parallel 1", 1),
    Run(1, "tensor parallel 1", 1, tie=True),
    Run(1, "tensor parallel 1", 1, by_token=True),
]
OTHERS = [
    Run(2, "context parallel 2", 1),
    Run(2, "context parallel 2", 2, by_token=True),
    Run(4, "context parallel 4", 2, tie=True),
    Run(4, "context parallel 2, sequence parallel 2", 1, tie=True),
    Run(4, "context parallel 2, 2 stages of 2 chunks", 2),
]
"""`test_every_layout` has those that do without what is special here: four parts, or recomputing."""
RECOMPUTING = (OTHERS[0], OTHERS[2], OTHERS[3])
"""Runs whose backward passes run the student's layers, and so the exchanges between ranks, a second time."""


# --- attention --------------------------------------------------------------------------------------------------------

NUM_POSITIONS, BLOCK_SIZE, HEAD_DIM = 16, 4, 6
LENGTHS = (16, 8)


def attention_inputs() -> list[torch.Tensor]:
    """Query, key and value of both streams `[S, 2B, heads, D]`, eight query heads to four; the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(NUM_POSITIONS, 2 * len(LENGTHS), heads, HEAD_DIM) for heads in (8, 4, 4, 8)]
    *tensors, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    is_real = torch.arange(NUM_POSITIONS)[:, None] < torch.tensor(LENGTHS).repeat(2)
    return [*tensors, (grad * is_real[..., None, None]).flatten(2)]


def core_attention(kind: str, group: dist.ProcessGroup | None):
    from types import SimpleNamespace

    from megatron.core.transformer import TransformerConfig

    from megatron_opdlm.models.attention.backend import AttentionCase, build_backend
    from megatron_opdlm.models.attention.core_attention import BlockDiffusionCoreAttention, CausalCoreAttention

    config = TransformerConfig(num_layers=1, hidden_size=48, num_attention_heads=8, num_query_groups=4)
    groups = None if group is None else SimpleNamespace(cp=group)
    if kind == "teacher":
        return CausalCoreAttention(config, 1, pg_collection=groups)
    backend = build_backend(kind, AttentionCase(device_type="cpu", dtype=torch.float64, head_dim=HEAD_DIM))
    return BlockDiffusionCoreAttention(config, 1, backend=backend, block_size=BLOCK_SIZE, pg_collection=groups)


def attend(kind: str, group: dist.ProcessGroup | None, part: slice) -> list[torch.Tensor]:
    """The output at this part of the positions, and the gradients of query, key and value there."""
    *inputs, grad = (tensor[part].clone() for tensor in attention_inputs())
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = core_attention(kind, group)(*leaves, None if kind == "teacher" else torch.tensor(LENGTHS))
    is_real = grad.abs().sum(-1, keepdim=True) > 0
    return [out.detach() * is_real, *torch.autograd.grad(out, leaves, grad)]


def attend_to_parts(rank: int, kinds: list[str]) -> dict[str, list[torch.Tensor]]:
    width = NUM_POSITIONS // dist.get_world_size()
    part = slice(rank * width, (rank + 1) * width)
    return {kind: attend(kind, dist.group.WORLD, part) for kind in kinds}


@pytest.fixture(scope="module")
def attended_in_parts() -> dict[int, list[dict]]:
    return {size: run_on_ranks(attend_to_parts, size, ["dense", "aten", "teacher"]) for size in (2, 4)}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["dense", "aten", "teacher"])
def test_attention_over_parts_and_its_gradients_are_those_over_whole_sequences(attended_in_parts, kind, size):
    expected = attend(kind, None, slice(None))
    actual = [torch.cat(parts) for parts in zip(*(rank[kind] for rank in attended_in_parts[size]), strict=True)]
    for ours, whole in zip(actual, expected, strict=True):
        assert (ours - whole).abs().max() <= 1e-12 * whole.abs().max()
    second_half = slice(NUM_POSITIONS // 2, None)
    without_exchange = attend(kind, None, second_half)
    assert (without_exchange[0] - expected[0][second_half]).abs().max() > 0.1, "a part alone would show"


# --- the link ---------------------------------------------------------------------------------------------------------


def use_link(rank: int) -> dict:
    from megatron_opdlm.distillation.teacher import outputs_before
    from megatron_opdlm.parallel.context_link import ContextLink

    link = ContextLink(dist.group.WORLD)
    columns = link.columns(6)
    numbers = torch.arange(12.0).view(2, 6, 1)  # the output at position i of row 0 is i, of row 1 it is 6 + i
    is_trained = torch.tensor([[0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0]]).bool()
    return {
        "columns": columns,
        "before": outputs_before(numbers[:, columns], is_trained[:, columns], link).flatten().tolist(),
        "sum": link.add_up_(torch.tensor([1.0, float(rank)])).tolist(),
    }


@pytest.fixture(scope="module")
def linked() -> list[dict]:
    return run_on_ranks(use_link, 2)


def test_each_rank_has_a_part_of_the_positions(linked):
    assert [rank["columns"] for rank in linked] == [slice(0, 3), slice(3, 6)]


def test_the_teachers_output_before_a_part_comes_from_the_rank_before(linked):
    # trained: 1, 3 and 5 of row 0, 2, 3 and 4 of row 1; position 3 is the first of rank 1
    assert [rank["before"] for rank in linked] == [[0.0, 7.0], [2.0, 4.0, 8.0, 9.0]]


def test_sums_are_those_of_all_parts(linked):
    assert [rank["sum"] for rank in linked] == [[2.0, 1.0], [2.0, 1.0]]


def test_a_rank_alone_has_everything_and_sends_nothing():
    from megatron_opdlm.parallel.context_link import ContextLink

    link, heads = ContextLink(None), torch.zeros(4, 1, 2, 3)
    assert link.columns(7) == slice(0, 7) and link.is_first
    assert link.whole_sequences(heads, heads) == (heads, heads) and link.own_positions(heads) is heads


# --- training ---------------------------------------------------------------------------------------------------------


def train_all(rank: int, runs: list[Run], root: Path) -> dict:
    """Metrics of each step, and this rank's trajectories by step, prompt and sample."""
    return {run: train_with_means_of_parts(run, root) if run == WRONG else train_long(run, root) for run in runs}


def train_long(run: Run, root: Path) -> tuple[list[dict], dict]:
    """Short prompts and long responses, so that every part of a sequence has trained positions."""
    rollout = RolloutConfig(max_new_tokens=20, denoising_steps_per_block=2, dynamic_threshold=0.1)
    data = DataConfig(train_files=[str(root / "prompts.jsonl")], apply_chat_template=False)
    training = TrainingConfig(
        max_steps=3,
        num_prompts_per_step=8,
        global_batch_size=8,
        micro_batch_size=run.micro_batch_size,
        pad_to_multiple=8,
        recompute="full" if run in RECOMPUTING else "none",
        loss_reduction="token" if run.by_token else "sequence",
    )
    student = StudentConfig(hf=str(root / ("tied" if run.tie else "untied")))
    return train(run, root, student=student, rollout=rollout, data=data, training=training)


def train_with_means_of_parts(run: Run, root: Path) -> tuple[list[dict], dict]:
    right = OnPolicyStates.loss_weights_BT
    try:
        OnPolicyStates.loss_weights_BT = weights_of_parts
        return train_long(run, root)
    finally:
        OnPolicyStates.loss_weights_BT = right


def weights_of_parts(states: OnPolicyStates, reduction: str) -> torch.Tensor:
    parts = states.is_trained_BT.float().chunk(2, dim=1)
    return torch.cat([part / part.sum(1, keepdim=True).clamp(min=1) for part in parts], dim=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("context")
    make_tiny_qwen3(root / "untied", seed=1, num_layers=4, num_heads=8, num_groups=4)
    make_tiny_qwen3(root / "tied", seed=2, num_layers=4, num_heads=8, num_groups=4, tie=True)
    make_tiny_qwen3(root / "teacher", seed=3, num_layers=4, num_heads=4, num_groups=4)
    write_prompts(root / "prompts.jsonl", 20)
    return root


@pytest.fixture(scope="module")
def results(root, world_of_one) -> dict[Run, list[tuple[list[dict], dict]]]:
    return train_in_worlds([*REFERENCES, *OTHERS, WRONG], root)


def train_in_worlds(runs: list[Run], root: Path) -> dict[Run, list[tuple[list[dict], dict]]]:
    """What `train_all` gives, by rank."""
    results = {}
    for world_size in sorted({run.world_size for run in runs}):
        mine = [run for run in runs if run.world_size == world_size]
        by_rank = [train_all(0, mine, root)] if world_size == 1 else run_on_ranks(train_all, world_size, mine, root)
        results |= {run: [rank[run] for rank in by_rank] for run in mine}
    return results


@pytest.mark.parametrize("run", OTHERS, ids=str)
def test_trajectories_are_those_of_one_process_and_all_ranks_that_share_sequences_have_them(results, run):
    expected = results[run.reference][0][1]
    assert len(expected) == 3 * 8
    data_parallel_size = run.world_size // model_ranks(CONTEXT_LAYOUTS[run.layout])
    actual = [pair for _, trajectories in results[run] for pair in trajectories.items()]
    assert len(actual) * data_parallel_size == run.world_size * len(expected)
    assert {key for key, _ in actual} == expected.keys()
    for key, line in actual:
        ours, one = Trajectory.from_json(line), Trajectory.from_json(expected[key])
        assert ours.terminal_ids_T.equal(one.terminal_ids_T) and ours.step_map_R.equal(one.step_map_R)
        assert (ours.log_probs_R - one.log_probs_R).abs().max() <= 1e-4


def assert_same_metrics(metrics: list[dict], expected: list[dict]) -> None:
    assert max(relative_errors(metrics, expected).values()) <= 1e-5
    for ours, one in zip(metrics, expected, strict=True):
        assert {name: ours[name] for name in SAME_COUNTS} == {name: one[name] for name in SAME_COUNTS}


def relative_errors(metrics: list[dict], expected: list[dict]) -> dict[str, float]:
    """The largest over the steps, by metric."""
    return {
        name: max(
            abs(ours[name] - one[name]) / max(abs(one[name]), 0.1) for ours, one in zip(metrics, expected, strict=True)
        )
        for name in SAME_NUMBERS
    }


@pytest.mark.parametrize("run", OTHERS, ids=str)
def test_losses_and_gradient_norms_on_all_ranks_are_those_of_one_process(results, run):
    for metrics, _ in results[run]:
        assert_same_metrics(metrics, results[run.reference][0][0])


def test_a_mean_over_the_trained_positions_of_a_part_would_show(results):
    errors = relative_errors(results[WRONG][0][0], results[WRONG.reference][0][0])
    assert errors["train/loss"] > 0.05 and errors["train/grad_norm"] > 0.05


@pytest.mark.parametrize("run", OTHERS, ids=str)
def test_weights_after_three_steps_are_those_of_one_process(results, root, run):
    assert_same_weights(root, run)


def assert_same_weights(root: Path, run: Run) -> None:
    start = read_weights(root / ("tied" if run.tie else "untied"))
    expected, actual = exported_weights(root, run.reference), exported_weights(root, run)
    assert actual.keys() == expected.keys() == start.keys()
    for name, weight in expected.items():
        difference = (actual[name] - weight).norm()
        assert difference <= 1e-6 * weight.norm(), name
        assert difference <= 1e-3 * (weight - start[name]).norm(), f"{name}: relative to what training changed"


def exported_weights(root: Path, run: Run) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of a run's last checkpoint, in float64."""
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    output = root / f"{run} exported"
    if not output.exists():
        megatron_to_hf(root / str(run) / "checkpoints", output, dtype=None)
    return read_weights(output)


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate_sharing(rank: int, root: Path) -> dict:
    return evaluate(root, CONTEXT_LAYOUTS["context parallel 2"])


def test_evaluation_has_the_responses_and_scores_of_one_process_on_all_ranks(root, world_of_one):
    expected = evaluate(root, ParallelConfig())
    assert len(expected["responses"]) == 3, "so the ranks' shares differ"
    assert run_on_ranks(evaluate_sharing, 2, root) == [expected, expected]
