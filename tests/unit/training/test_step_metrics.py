"""A step's metrics by hand: two trajectories, two optimizer steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.models.qwen3 import Qwen3Architecture
from megatron_opdlm.training.step_metrics import StepMetrics

ARCHITECTURE = Qwen3Architecture(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=32,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    dtype="float32",
)


def trajectory(steps: list[int], response_length: int, stop_reason: str) -> Trajectory:
    return Trajectory(
        prompt_id=0,
        sample_index=0,
        prompt_length=4,
        block_size=4,
        terminal_ids_T=torch.arange(4 + len(steps)),
        step_map_R=torch.tensor(steps),
        log_probs_R=torch.zeros(len(steps)),
        response_length=response_length,
        stop_reason=stop_reason,
        domain="",
    )


def groups() -> SimpleNamespace:
    return SimpleNamespace(dp=dist.group.WORLD, dp_cp=dist.group.WORLD)


@pytest.fixture
def metrics(world_of_one) -> StepMetrics:
    return StepMetrics(ARCHITECTURE, ARCHITECTURE, groups=groups())


def sums(loss: float, rows: int, trained: int, agreements: int, gap: float, committed: int) -> dict[str, float]:
    return {
        "grad_norm": 1.0,
        "is_skipped": 0.0,
        "loss": loss,
        "loss_count": rows,
        "trained_tokens": trained,
        "agreements": agreements,
        "on_policy_gap": gap,
        "committed_tokens": committed,
    }


def rows() -> OnPolicyStates:
    """8 tokens of which 3 are trained, 12 of which 5 are."""
    ids_BT = torch.zeros(2, 12, dtype=torch.int64)
    is_trained_BT = torch.arange(12) < torch.tensor([[3], [5]])
    return OnPolicyStates(ids_BT, ids_BT, torch.tensor([8, 12]), is_trained_BT, is_trained_BT, ids_BT.float())


def of_step(metrics: StepMetrics) -> dict[str, float]:
    trajectories = [trajectory([1, 1, 1, 1], 3, "end_token"), trajectory([1, 2, 3, 4, 1, 1, 2, 2], 8, "length")]
    step_sums = [sums(4.0, 2, 10, 5, 0.2, 4), sums(1.0, 2, 30, 30, 0.0, 0)]
    settings = {"lr": 1e-5, "length_limit": 8, "dynamic_threshold": 0.75}
    return metrics.of_step(trajectories, rows(), step_sums, {"total": 2.0}, **settings)


def test_means_are_weighted_by_what_they_are_means_of(metrics):
    values = of_step(metrics)
    assert values["train/loss"] == pytest.approx(5 / 4)
    assert values["train/teacher_agreement"] == pytest.approx(35 / 40)
    assert values["train/on_policy_gap"] == pytest.approx(0.05)
    assert values["rollout/tokens_per_step"] == pytest.approx(11 / 7)
    assert values["rollout/response_length"] == 5.5
    assert values["rollout/end_token_fraction"] == 0.5
    assert values["perf/tokens_per_second"] == 5.5


def test_paper_flops_are_six_and_two_per_parameter_and_token(metrics):
    num_parameters = 32 * 8 + 8 + 2 * 8 + 2 * 4 + (2 * 2 + 2) * 4 * 8 + 3 * 8 * 16
    assert of_step(metrics)["perf/paper_flops"] == 8 * num_parameters * 11


def test_true_flops_count_every_row_with_its_trained_positions(metrics):
    # two FLOPs per weight and token, four per pair, head and dimension; one layer, two heads of four
    linear, pair, logits = 2 * ((2 * 2 + 2) * 4 * 8 + 3 * 8 * 16), 4 * 8, 2 * 8 * 32
    teacher = 20 * linear + (8 * 9 // 2 + 12 * 13 // 2) * pair + 8 * logits
    student = 3 * (40 * linear + 2 * (8 * 12 // 2 + 12 * 16 // 2) * pair + 8 * logits)
    # a prompt block and the block behind it, in one step; and in four and two steps
    first = 8 * linear + (16 + 4 * 8) * pair + 4 * logits
    second = (8 + 6 * 4) * linear + (16 + 32 + 4 * 4 * 8 + 2 * 4 * 12) * pair + (10 + 6) * logits
    assert of_step(metrics)["perf/true_flops"] == teacher + student + first + second


def test_the_threshold_is_logged(metrics):
    assert of_step(metrics)["rollout/dynamic_threshold"] == 0.75


def test_a_step_that_was_skipped_is_counted_and_in_no_mean(metrics):
    taken = sums(4.0, 2, 10, 5, 0.2, 4) | {"student_entropy": 15.0}
    skipped = sums(float("inf"), 2, 30, 30, float("nan"), 9) | {"grad_norm": float("nan"), "is_skipped": 1.0}
    settings = {"lr": 1e-5, "length_limit": 8, "dynamic_threshold": 0.75}
    values = metrics.of_step(
        [trajectory([1, 1, 1, 1], 3, "length")], rows(), [taken, skipped], {"total": 2.0}, **settings
    )
    assert values["train/skipped_steps"] == 1
    assert (values["train/loss"], values["train/grad_norm"], values["train/trained_tokens"]) == (2.0, 1.0, 10)
    assert values["train/student_entropy"] == 1.5


def test_what_went_wrong_in_the_rollout_is_counted(metrics):
    settings = {"lr": 1e-5, "length_limit": 8, "dynamic_threshold": 0.75}
    made = [trajectory([1, 1, 1, 1], 1, "not_finite"), trajectory([1, 1, 1, 1], 4, "length")]
    values = metrics.of_step(made, rows(), [sums(4.0, 2, 10, 5, 0.2, 4)], {"total": 2.0}, **settings)
    assert values["rollout/not_finite"] == 1
    assert values["rollout/repetition_rate"] == 0
    assert values["train/skipped_steps"] == 0


def test_totals_go_on_from_a_saved_state(metrics):
    first = of_step(metrics)
    resumed = StepMetrics(ARCHITECTURE, ARCHITECTURE, groups=groups())
    resumed.load_state_dict(metrics.state_dict())
    assert of_step(resumed)["rollout/total_tokens"] == 2 * first["rollout/total_tokens"]
