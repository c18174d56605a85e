"""Communication beside computation changes not a bit: neither trajectories, losses nor weights.

Each run is a whole `Trainer`, as in `test_train_step_invariance`; the reference is the same layout with every transfer
waited for. The buckets of parameters are small enough for a model of this size to have many. At most two ranks add up
a gradient: the sum of more would be rounded in an order that depends on the buckets.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_opdlm.config.schema import CheckpointConfig, LoggingConfig, OptimizerConfig, TrainingConfig
from tests.distributed.test_train_step_invariance import OPTIMIZER, Run, train
from tests.ranks import run_on_ranks
from tests.tiny_moe import make_tiny_moe
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import EXPERT_LAYOUTS, LAYOUTS, PIPELINE_LAYOUTS

BUCKET_SIZE = 3000
"""Parameters in a bucket; a layer of the tiny models has four times as many."""
# With clipping, the order in which the shards of the buckets add up to the norm would round differently.
UNCLIPPED: OptimizerConfig = dataclasses.replace(OPTIMIZER, clip_grad=0.0)


@dataclass(frozen=True)
class Overlap:
    """What goes on beside computation."""

    grad_reduce: bool
    param_gather: bool


NONE, BOTH = Overlap(False, False), Overlap(True, True)
DENSE = {
    Run(1, "tensor parallel 1", 2): [BOTH],
    Run(2, "tensor parallel 1", 1): [BOTH, Overlap(True, False), Overlap(False, True)],
    Run(4, "2 stages", 1, tie=True): [BOTH],
    Run(4, "2 stages of 2 chunks", 1, tie=True): [BOTH],
}
EXPERTS = {
    Run(2, "experts over 2", 2): [BOTH],
    Run(4, "sequence parallel 2, whole experts over 2", 1): [BOTH],
}
RESUMED = Run(2, "tensor parallel 1", 1)
CASES = [("dense", run, overlap) for run, overlaps in DENSE.items() for overlap in overlaps] + [
    ("experts", run, overlap) for run, overlaps in EXPERTS.items() for overlap in overlaps
]


@dataclass
class Outcome:
    """What a rank saw of a run."""

    metrics: list[dict]
    trajectories: dict
    weights: dict[str, torch.Tensor]
    pending: list[bool]
    """At each rollout, and before each forward of the student in training, whether weights were still under way."""
    num_buckets: int
    num_early: int
    """Times that a bucket's gradients were sent off before the last backward pass was over."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("overlap")
    for kind in ("dense", "experts"):
        (root / kind).mkdir()
        write_prompts(root / kind / "prompts.jsonl", 20)
    make_tiny_qwen3(root / "dense/untied", seed=1, num_layers=4)
    make_tiny_qwen3(root / "dense/tied", seed=2, num_layers=4, tie=True)
    make_tiny_qwen3(root / "dense/teacher", seed=3, num_layers=4)
    make_tiny_moe(root / "experts/untied", seed=1)
    make_tiny_moe(root / "experts/teacher", seed=3, norm_topk_prob=False)
    return root


def is_pending(student) -> bool:
    groups = [group for chunk in student.wrapped for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
    return any(group.param_gather_handle is not None for group in groups)


def train_with(overlap: Overlap, run: Run, root: Path, name: str = "", waits: bool = True) -> Outcome:
    """A run of three steps in buckets of BUCKET_SIZE, or what is left of them where the directory has a checkpoint.

    `waits` False leaves out every wait for weights.
    """
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Buckets

    from megatron_opdlm.rollout.engine import RolloutEngine
    from megatron_opdlm.training import optimizer, train_step, trainer

    layouts = LAYOUTS | PIPELINE_LAYOUTS | EXPERT_LAYOUTS
    parallel = dataclasses.replace(
        layouts[run.layout], overlap_grad_reduce=overlap.grad_reduce, overlap_param_gather=overlap.param_gather
    )
    students, pending, early = [], [], []
    with pytest.MonkeyPatch.context() as patch:
        smaller = functools.partial(optimizer.DistributedDataParallelConfig, bucket_size=BUCKET_SIZE)
        patch.setattr(optimizer, "DistributedDataParallelConfig", smaller)
        make_trainable, generate = trainer.make_trainable, RolloutEngine.generate
        schedule, ready = train_step.get_forward_backward_func, Buckets.register_grad_ready

        def noting_make_trainable(*arguments):
            students.append(make_trainable(*arguments))
            return students[-1]

        def noting_generate(engine, *arguments):
            pending.append(is_pending(students[-1]))
            return generate(engine, *arguments)

        def noting_schedule():
            pending.append(is_pending(students[-1]))
            return schedule()

        def noting_ready(buckets, *arguments):
            was_sent = buckets.grad_reduce_handle is not None
            ready(buckets, *arguments)
            early.append(buckets.grad_reduce_handle is not None and not was_sent)

        patch.setattr(trainer, "make_trainable", noting_make_trainable)
        patch.setattr(RolloutEngine, "generate", noting_generate)
        patch.setattr(train_step, "get_forward_backward_func", noting_schedule)
        patch.setattr(Buckets, "register_grad_ready", noting_ready)
        if not waits:
            patch.setattr(trainer, "wait_for_weights", lambda student: None)
            patch.setattr(train_step, "wait_for_weights", lambda student: None)
        logging = LoggingConfig(directory=str(root / f"{run} {overlap}{name}"), tensorboard=False, progress_bar=False)
        checkpoint = CheckpointConfig(save_interval=2 if run == RESUMED else 0)
        training = TrainingConfig(
            max_steps=3,
            num_prompts_per_step=8,
            global_batch_size=4,
            micro_batch_size=run.micro_batch_size,
            pad_to_multiple=8,
        )
        metrics, trajectories = train(
            run,
            root,
            parallel=parallel,
            optimizer=UNCLIPPED,
            training=training,
            checkpoint=checkpoint,
            logging=logging,
        )
    (student,) = students
    weights = {name: parameter.detach().clone() for name, parameter in student.model.named_parameters()}
    num_buckets = sum(len(c.bucket_groups) + len(c.expert_parallel_bucket_groups) for c in student.wrapped)
    return Outcome(metrics, trajectories, weights, pending, num_buckets, sum(early))


def train_all(rank: int, cases: list[tuple[str, Run, Overlap]], root: Path) -> dict[tuple, Outcome]:
    return {case: train_with(case[2], case[1], root / case[0]) for case in cases}


@pytest.fixture(scope="module")
def outcomes(root, world_of_one) -> dict[tuple, list[Outcome]]:
    """Case, or the same with NONE -> what each rank saw."""
    results = {}
    everything = CASES + [(kind, run, NONE) for kind, run in dict.fromkeys(case[:2] for case in CASES)]
    for world_size in (1, 2, 4):
        mine = [case for case in everything if case[1].world_size == world_size]
        by_rank = [train_all(0, mine, root)] if world_size == 1 else run_on_ranks(train_all, world_size, mine, root)
        results |= {case: [rank[case] for rank in by_rank] for case in mine}
    return results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_is_the_same_to_the_bit(outcomes, case):
    kind, run, _ = case
    for actual, expected in zip(outcomes[case], outcomes[kind, run, NONE], strict=True):
        assert actual.trajectories == expected.trajectories and expected.trajectories
        assert [step["train/loss"] for step in actual.metrics] == [step["train/loss"] for step in expected.metrics]
        assert actual.weights.keys() == expected.weights.keys()
        for name, weight in expected.weights.items():
            assert actual.weights[name].equal(weight), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whatever_reads_weights_finds_them_all_there(outcomes, case):
    for outcome in outcomes[case]:
        assert len(outcome.pending) == 3 + 6, "three rollouts and six optimizer steps"
        assert not any(outcome.pending)


def test_gradients_of_a_bucket_are_sent_off_while_the_backward_pass_goes_on(outcomes):
    for (kind, run, overlap), ranks in outcomes.items():
        for outcome in ranks:
            if overlap.grad_reduce:
                # Megatron learns in the first of the six optimizer steps when a bucket is complete.
                assert outcome.num_early == 5 * outcome.num_buckets, (kind, run)
            else:
                assert outcome.num_early == 0
        first_stage = ranks[0]
        assert first_stage.num_buckets > 4 or not overlap.grad_reduce, "one bucket would hide mistakes"


def train_without_waiting(rank: int, root: Path) -> list[bool]:
    try:
        return train_with(BOTH, RESUMED, root, " without waiting", waits=False).pending
    except AssertionError as error:  # Megatron's own, when it is to send weights off that are still under way
        return [bool(error)]


def test_the_comparison_sees_weights_that_are_read_before_they_are_there(root, outcomes):
    for pending in run_on_ranks(train_without_waiting, 2, root / "dense"):
        assert any(pending)


def resume(rank: int, root: Path) -> dict[Overlap, Outcome]:
    return {overlap: train_with(overlap, RESUMED, root, " resumed") for overlap in (NONE, BOTH)}


def test_a_checkpoint_of_many_buckets_is_resumed_in_one_and_the_other_way_round(root, outcomes):
    step = "checkpoints/step_00000002"
    for source, target in ((NONE, BOTH), (BOTH, NONE)):
        shutil.copytree(root / f"dense/{RESUMED} {source}" / step, root / f"dense/{RESUMED} {target} resumed" / step)
    for rank, resumed in enumerate(run_on_ranks(resume, 2, root / "dense")):
        expected = outcomes["dense", RESUMED, NONE][rank]
        for outcome in resumed.values():
            assert len(outcome.metrics) == 1
            for name, weight in expected.weights.items():
                assert outcome.weights[name].equal(weight), name
