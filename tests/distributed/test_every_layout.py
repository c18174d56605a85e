"""Every layout of at most four processes trains as one process does, and goes on from the checkpoint of another one.

The table of layouts is generated: every combination of the axes below that fits. Under each of them a whole `Trainer`
takes three steps (rollout, states, teacher, student, optimizer) and saves. Then each takes the fourth step from what
the layout before it in the table saved, and the first layout from the last one's: a ring, in which each is written from
and read into once. The reference is the run of one process, one row at a time, that takes all four. What is compared is
the losses, the trajectories token by token, and all tensors of the checkpoints: weights and the optimizer's moments.

    LAYOUTS["mixture"]["TP2+SP DP2 EP2"]                 # Layout(num_ranks=4, parallel=ParallelConfig(...))
"""

from __future__ import annotations

import functools
import itertools
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_opdlm.config.check import check_config
from megatron_opdlm.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ParallelConfig,
    RolloutConfig,
    TrainingConfig,
)
from megatron_opdlm.diffusion.trajectory import Trajectory
from tests.distributed.test_resharding import tensors
from tests.distributed.test_train_step_invariance import OPTIMIZER, SAME_COUNTS, SAME_NUMBERS
from tests.ranks import run_on_ranks
from tests.tiny_moe import make_tiny_moe
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, model_ranks, quiet_logging, run_trainer, tiny_config

MAX_RANKS = 4
ONE = "one process"
STEPS = 3
TIME_LIMIT = 1800.0
"""Seconds for all layouts of as many processes, which take ten minutes on a machine with little else to do. The
processes stay for all: their first layout takes them longest."""
pytestmark = pytest.mark.timeout(2 * TIME_LIMIT)  # whichever test comes first waits for all the runs
TWO_STAGES = {"pipeline_model_parallel_size": 2}
SEQUENCE_PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SHARED_EXPERTS = {"expert_model_parallel_size": 2}
AXES: list[dict[str, dict]] = [
    {"": {}, "TP2": {"tensor_model_parallel_size": 2}, "TP2+SP": SEQUENCE_PARALLEL},
    {"": {}, "PP2": TWO_STAGES, "PP2xVPP2": TWO_STAGES | {"virtual_pipeline_model_parallel_size": 2}},
    {"": {}, "CP2": {"context_parallel_size": 2}},
    {"": {}, "EP2": SHARED_EXPERTS, "EP2xETP1": SHARED_EXPERTS | {"expert_tensor_parallel_size": 1}},
]
"""By axis, name -> settings."""
DATA_PARALLEL = {"": 1, "DP2": 2}
"""The axis without a setting: how many times the others' ranks are there."""


@dataclass(frozen=True)
class Layout:
    """One row of the table."""

    num_ranks: int
    parallel: ParallelConfig

    @property
    def data_parallel_size(self) -> int:
        """What the other axes leave of the ranks."""
        return self.num_ranks // model_ranks(self.parallel)


def every_combination() -> dict[str, Layout]:
    """All of at most MAX_RANKS, whether or not anything else is in their way, by number of ranks."""
    combinations = {}
    for (copies, num_copies), *axes in itertools.product(DATA_PARALLEL.items(), *(axis.items() for axis in AXES)):
        *names, experts = (name for name, _ in axes)
        parallel = ParallelConfig(**{key: value for _, settings in axes for key, value in settings.items()})
        num_ranks = num_copies * model_ranks(parallel)
        if num_ranks <= MAX_RANKS:
            combinations[" ".join(filter(None, [*names, copies, experts])) or ONE] = Layout(num_ranks, parallel)
    return dict(sorted(combinations.items(), key=lambda item: item[1].num_ranks))


def serves(row: Layout, kind: str) -> bool:
    """What the settings' documentation asks for, beside the number of ranks."""
    parallel = row.parallel
    if kind == "dense":
        return parallel.expert_model_parallel_size == 1
    may_cut = parallel.sequence_parallel or parallel.tensor_model_parallel_size == 1
    return may_cut and (parallel.expert_model_parallel_size == 1 or has_room_for_experts(row))


def has_room_for_experts(row: Layout) -> bool:
    """Whole experts only where those that tensor parallelism cuts would need more ranks, to keep the table short."""
    parallel = row.parallel
    available = row.num_ranks // parallel.pipeline_model_parallel_size
    fits_cut = available % (2 * parallel.tensor_model_parallel_size) == 0
    is_whole = parallel.expert_tensor_parallel_size == 1
    fits_whole = parallel.tensor_model_parallel_size > 1 and available % 2 == 0
    has_room = fits_whole and not fits_cut if is_whole else fits_cut
    return has_room and parallel.virtual_pipeline_model_parallel_size is None


LAYOUTS = {
    kind: {name: row for name, row in every_combination().items() if serves(row, kind)} for kind in ("dense", "mixture")
}
"""Kind of model -> name -> layout, the one process first."""
CASES = [(kind, name) for kind, layouts in LAYOUTS.items() for name in layouts]
SPREAD = [(kind, name) for kind, name in CASES if name != ONE]
SOURCES = {
    (kind, name): source
    for kind, layouts in LAYOUTS.items()
    for name, source in zip(layouts, [list(layouts)[-1], *layouts], strict=False)
}
"""The ring: (kind, layout) -> the layout whose checkpoint it goes on from."""

# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_has_every_layout_of_a_dense_model():
    axes = [("TP2", "TP2+SP"), ("PP2", "PP2xVPP2"), ("CP2",), ("DP2",)]
    pairs = {frozenset(pair) for two in itertools.combinations(axes, 2) for pair in itertools.product(*two)}
    single = {frozenset([name]) for axis in axes for name in axis}
    assert len(pairs) == 13 and len(single) == 6
    assert {frozenset(name.split()) for name in LAYOUTS["dense"] if name != ONE} == pairs | single


def test_the_table_has_every_layout_of_a_mixture():
    """A mixture asks for sequence parallelism beside tensor parallelism, and shared experts for no chunks."""
    names = set(LAYOUTS["mixture"])
    dense = {name for name in LAYOUTS["dense"] if "TP2" not in name.split()}
    assert {name for name in names if "EP2" not in name} == dense
    assert {name for name in names if "EP2" in name} == {
        "CP2 EP2",
        "DP2 EP2",
        "CP2 DP2 EP2",
        "PP2 CP2 EP2",
        "PP2 DP2 EP2",
        "TP2+SP CP2 EP2",
        "TP2+SP DP2 EP2",
        "TP2+SP EP2xETP1",
        "TP2+SP PP2 EP2xETP1",
    }


@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_layout_is_written_from_and_read_into_once(kind):
    sources = [SOURCES[kind, name] for name in LAYOUTS[kind]]
    assert sorted(sources) == sorted(LAYOUTS[kind]) and all(SOURCES[kind, name] != name for name in LAYOUTS[kind])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_settings_take_every_layout(tmp_path, kind, name):
    check_config(config_of(tmp_path, kind, name, name, STEPS), LAYOUTS[kind][name].num_ranks)


# --- the runs ---------------------------------------------------------------------------------------------------------

Case = tuple[str, str]
Outcome = tuple[list[dict[str, float]], dict[tuple[int, int, int], str]]


def config_of(root: Path, kind: str, name: str, run: str, max_steps: int) -> Config:
    """Short prompts beside the responses, so that every part of a sequence has trained positions."""
    row = LAYOUTS[kind][name]
    return tiny_config(
        root / kind,
        teacher=root / f"{kind} teacher",
        parallel=row.parallel,
        backend="aten",
        rollout=RolloutConfig(max_new_tokens=8, block_size=8, denoising_steps_per_block=2, dynamic_threshold=0.12),
        data=DataConfig(train_files=[str(root / "prompts.jsonl")], apply_chat_template=False),
        optimizer=replace(OPTIMIZER, lr_decay_steps=8),
        training=TrainingConfig(
            max_steps=max_steps,
            num_prompts_per_step=4,
            global_batch_size=4,
            # two micro-batches for each data-parallel rank, four for the reference
            micro_batch_size=1 if name == ONE else 2 // row.data_parallel_size,
            pad_to_multiple=16,
        ),
        checkpoint=CheckpointConfig(save_interval=STEPS, async_save=False),
        logging=quiet_logging(root / kind / run),
    )


def train(root: Path, kind: str, name: str) -> Outcome:
    """Three steps from the start, and the reference one more."""
    return run_trainer(config_of(root, kind, name, name, STEPS + (name == ONE)))


def go_on(root: Path, kind: str, name: str) -> Outcome:
    """One step from the checkpoint of the layout that `SOURCES` names. All ranks must call it."""
    source = SOURCES[kind, name]
    run = run_after(source, name)
    if dist.get_rank() == 0:
        step = f"checkpoints/step_{STEPS:08d}"
        shutil.copytree(root / kind / source / step, root / kind / run / step)
    dist.barrier()
    return run_trainer(config_of(root, kind, name, run, STEPS + 1))


def run_after(source: str, name: str) -> str:
    return f"{name} after {source}"


def train_and_go_on(rank: int, root: Path, cases: list[Case]) -> tuple[dict[Case, Outcome], dict[Case, Outcome]]:
    """All cases of one number of ranks, in the order of the table; those of fewer ranks must be through."""
    trained, gone_on = {}, {}
    for kind, name in cases:
        with layout(LAYOUTS[kind][name].parallel):
            trained[kind, name] = train(root, kind, name)
            gone_on[kind, name] = go_on(root, kind, name)
    return trained, gone_on


@dataclass
class Outcomes:
    """What each case gave, by rank."""

    trained: dict[Case, list[Outcome]]
    gone_on: dict[Case, list[Outcome]]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    shape = {"num_layers": 4, "num_heads": 8, "num_groups": 4}
    make_tiny_qwen3(root / "dense", seed=1, tie=True, **shape)
    make_tiny_qwen3(root / "dense teacher", seed=3, **shape)
    make_tiny_moe(root / "mixture", seed=1, **shape)
    make_tiny_moe(root / "mixture teacher", seed=3, **shape)
    write_prompts(root / "prompts.jsonl", 20)
    return root


@pytest.fixture(scope="module")
def outcomes(root, world_of_one) -> Outcomes:
    alone = [(kind, ONE) for kind in LAYOUTS]
    with layout(ParallelConfig()):
        outcomes = Outcomes({case: [train(root, *case)] for case in alone}, {})
    for num_ranks in (2, 4):
        cases = [(kind, name) for kind, name in CASES if LAYOUTS[kind][name].num_ranks == num_ranks]
        by_rank = run_on_ranks(train_and_go_on, num_ranks, root, cases, time_limit=TIME_LIMIT)
        for case in cases:
            outcomes.trained[case] = [trained[case] for trained, _ in by_rank]
            outcomes.gone_on[case] = [gone_on[case] for _, gone_on in by_rank]
    with layout(ParallelConfig()):
        outcomes.gone_on |= {case: [go_on(root, *case)] for case in alone}
    return outcomes


# --- what is compared -------------------------------------------------------------------------------------------------


def largest_difference(actual: list[dict], expected: list[dict]) -> float:
    """Of the metrics that do not depend on the clock; relative, but to 0.1 where a number is smaller than that."""
    differences = []
    for ours, one in zip(actual, expected, strict=True):
        assert {name: ours[name] for name in SAME_COUNTS} == {name: one[name] for name in SAME_COUNTS}
        names = [*SAME_NUMBERS, *(name for name in one if name.startswith("moe/"))]
        differences += [abs(ours[name] - one[name]) / max(abs(one[name]), 0.1) for name in names]
    return max(differences)


def assert_same_trajectories(outcomes: list[Outcome], row: Layout, expected: dict) -> None:
    """All ranks of a model have those of its data-parallel share."""
    actual = [pair for _, trajectories in outcomes for pair in trajectories.items()]
    assert {key for key, _ in actual} == expected.keys()
    assert len(actual) == model_ranks(row.parallel) * len(expected)
    for key, line in actual:
        ours, one = Trajectory.from_json(line), Trajectory.from_json(expected[key])
        assert ours.terminal_ids_T.equal(one.terminal_ids_T) and ours.step_map_R.equal(one.step_map_R)
        assert (ours.response_length, ours.stop_reason) == (one.response_length, one.stop_reason)
        assert (ours.log_probs_R - one.log_probs_R).abs().max() <= 1e-4


@functools.lru_cache(maxsize=4)
def state_of_one_process(root: Path, kind: str, step: int) -> dict[str, torch.Tensor]:
    """Read once for all the layouts that are compared with it."""
    return state_of(root, kind, ONE, step)


def state_of(root: Path, kind: str, run: str, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, without the rows of the vocabulary that only fill it up."""
    num_tokens = len(AutoTokenizer.from_pretrained(root / kind)) + 1  # the mask token is the last one
    state = tensors(root / kind / run / "checkpoints" / f"step_{step:08d}")
    return {
        key: tensor[:num_tokens] if "word_embeddings" in key or "output_layer" in key else tensor
        for key, tensor in state.items()
    }


def state_differences(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The largest relative one of the weights, and of Adam's moments, which tell the gradients."""
    assert actual.keys() == expected.keys()
    differences = {True: [], False: []}
    for key, one in expected.items():
        assert actual[key].dtype == one.dtype and one.any(), key
        differences["exp_avg" in key].append(float((actual[key] - one).double().norm() / one.double().norm()))
    assert len(differences[True]) >= 20 and len(differences[False]) >= 20
    return max(differences[False]), max(differences[True])


def first_steps(outcome: Outcome) -> Outcome:
    metrics, trajectories = outcome
    return metrics[:STEPS], {key: line for key, line in trajectories.items() if key[0] < STEPS}


def next_step(outcome: Outcome) -> Outcome:
    metrics, trajectories = outcome
    return metrics[STEPS:], {key: line for key, line in trajectories.items() if key[0] >= STEPS}


@pytest.mark.parametrize(("kind", "name"), SPREAD)
def test_three_steps_have_the_trajectories_of_one_process(outcomes, kind, name):
    _, expected = first_steps(outcomes.trained[kind, ONE][0])
    assert len(expected) == STEPS * 4
    assert_same_trajectories(outcomes.trained[kind, name], LAYOUTS[kind][name], expected)


@pytest.mark.parametrize(("kind", "name"), SPREAD)
def test_three_steps_have_the_losses_and_gradient_norms_of_one_process_on_all_ranks(outcomes, kind, name):
    expected, _ = first_steps(outcomes.trained[kind, ONE][0])
    for metrics, _ in outcomes.trained[kind, name]:
        assert largest_difference(metrics, expected) <= 1e-5


@pytest.mark.parametrize(("kind", "name"), SPREAD)
def test_three_steps_end_at_the_weights_and_moments_of_one_process(outcomes, root, kind, name):
    expected = state_of_one_process(root, kind, STEPS)
    of_weights, of_moments = state_differences(state_of(root, kind, name, STEPS), expected)
    assert of_weights <= 1e-6 and of_moments <= 3e-5


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_step_after_a_checkpoint_of_another_layout_is_that_of_one_process(outcomes, root, kind, name):
    expected_metrics, expected_trajectories = next_step(outcomes.trained[kind, ONE][0])
    for metrics, _ in outcomes.gone_on[kind, name]:
        assert largest_difference(metrics, expected_metrics) <= 1e-5
    assert_same_trajectories(outcomes.gone_on[kind, name], LAYOUTS[kind][name], expected_trajectories)
    state = state_of(root, kind, run_after(SOURCES[kind, name], name), STEPS + 1)
    of_weights, of_moments = state_differences(state, state_of_one_process(root, kind, STEPS + 1))
    assert of_weights <= 1e-6 and of_moments <= 3e-5
