"""What a training step tells: quality of the rollout, loss, costs; and totals over the run.

metrics = StepMetrics(student_architecture, teacher_architecture, groups=groups)
metrics.of_step(trajectories, states, step_sums, timers.seconds(), lr=1e-5, length_limit=256, dynamic_threshold=0.9)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.models.qwen3 import Qwen3Architecture
from megatron_opdlm.observability import throughput
from megatron_opdlm.observability.metrics import MetricAccumulator
from megatron_opdlm.planning.work import model_shape
from megatron_opdlm.training.balance import TokenImbalance


class StepMetrics:
    """Turns a step's trajectories and sums into named numbers, the same on all data- and context-parallel ranks."""

    def __init__(
        self, student: Qwen3Architecture, teacher: Qwen3Architecture | None = None, *, groups: ProcessGroupCollection
    ) -> None:
        self.student, self.teacher = model_shape(student), None if teacher is None else model_shape(teacher)
        self.student_parameters = throughput.num_active_parameters(self.student, student.tie_word_embeddings)
        self.teacher_parameters = (
            0 if teacher is None else throughput.num_active_parameters(self.teacher, teacher.tie_word_embeddings)
        )
        self.groups = groups
        self.totals = dict.fromkeys(("rollout/total_tokens", "perf/total_paper_flops", "perf/total_true_flops"), 0.0)

    def of_step(
        self,
        trajectories: list[Trajectory],
        states: OnPolicyStates,
        step_sums: list[dict[str, float]],
        seconds: dict[str, float],
        *,
        lr: float,
        length_limit: int,
        dynamic_threshold: float,
        imbalances: Sequence[TokenImbalance] = (),
        rollout_metrics: MetricAccumulator | None = None,
        max_expert_load: float | None = None,
    ) -> dict[str, float]:
        """The metrics of one step. All ranks must call it: it gathers over the data- and context-parallel group.

        `states` are this rank's rows, whichever rank rolled them out. `step_sums` has, for each optimizer step, what
        `TrainStep` returned; `seconds` are this rank's own.
        `imbalances` has those of the global batches, the same on all ranks; without them there is no figure of it.
        `rollout_metrics` are this rank's `RolloutStatistics.metrics`; `max_expert_load` is `ExpertLoad.take`.
        """
        local = MetricAccumulator()
        for trajectory in trajectories:
            self._add_trajectory(local, trajectory)
        local.add_sum("perf/true_flops", self._learning_flops(states, trajectories[0].block_size))
        for sums in step_sums:
            if not sums["is_skipped"]:
                _add_sums(local, sums)
        for imbalance in imbalances:
            local.add("train/token_imbalance_before", imbalance.before)
            local.add("train/token_imbalance", imbalance.after)
        if max_expert_load is not None:
            local.add("moe/max_expert_load", max_expert_load)
        # Ranks that share sequences have the same trajectories, but each has decoded some of its own.
        values = _of_all(local, self.groups.dp) | _of_all(rollout_metrics or MetricAccumulator(), self.groups.dp_cp)
        values |= {"train/lr": lr, "train/skipped_steps": sum(sums["is_skipped"] for sums in step_sums)}
        if "rollout/tokens" in values:
            values |= {"rollout/length_limit": length_limit, "rollout/dynamic_threshold": dynamic_threshold}
        num_tokens = values.get("rollout/tokens", 0) + values.get("data/response_tokens", 0)
        values |= {f"perf/seconds_{phase}": value for phase, value in seconds.items()}
        values["perf/paper_flops"] = throughput.paper_flops(
            self.student_parameters, self.teacher_parameters, int(num_tokens)
        )
        values["perf/tokens_per_second"] = num_tokens / seconds["total"]
        for total in self.totals:
            self.totals[total] += values.get(total.replace("total_", ""), 0.0)
        return values | self.totals

    def state_dict(self) -> dict[str, float]:
        """The totals over the run."""
        return dict(self.totals)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on counting from `state`."""
        assert state.keys() == self.totals.keys(), f"totals {sorted(state)} are not {sorted(self.totals)}"
        self.totals = dict(state)

    def _add_trajectory(self, metrics: MetricAccumulator, trajectory: Trajectory) -> None:
        if trajectory.is_given:
            metrics.add("data/response_length", trajectory.response_length)
            metrics.add_sum("data/response_tokens", trajectory.response_length)
            return
        metrics.add("rollout/tokens_per_step", trajectory.tokens_per_step, weight=trajectory.num_steps)
        metrics.add("rollout/steps_per_block", trajectory.num_steps / trajectory.num_blocks)
        metrics.add("rollout/response_length", trajectory.response_length)
        metrics.add("rollout/end_token_fraction", trajectory.stop_reason == "end_token")
        metrics.add("rollout/repetition_rate", trajectory.repetition_rate)
        metrics.add_sum("rollout/not_finite", trajectory.stop_reason == "not_finite")
        metrics.add_sum("rollout/tokens", trajectory.response_length)
        metrics.add_sum("perf/true_flops", self._rollout_flops(trajectory))

    def _rollout_flops(self, trajectory: Trajectory) -> int:
        steps_by_block = trajectory.steps_by_block_MK
        return throughput.rollout_flops(
            self.student,
            trajectory.prompt_length,
            steps_by_block.amax(1).tolist(),
            int(steps_by_block.sum()),
            trajectory.block_size,
        )

    def _learning_flops(self, states: OnPolicyStates, block_size: int) -> int:
        """The teacher's forward over each row and the student's training on it, without padding.

        Left out is what ablations spend besides: a teacher that decodes, a student that scores its masks.
        """
        sizes = list(zip(states.lengths_B.tolist(), states.num_trained_B.tolist(), strict=True))
        training = sum(throughput.student_training_flops(self.student, *size, block_size) for size in sizes)
        if self.teacher is None:
            return training
        return training + sum(throughput.teacher_flops(self.teacher, *size) for size in sizes)


def _of_all(local: MetricAccumulator, group: dist.ProcessGroup) -> dict[str, float]:
    """The values over the ranks of a group, which must all call it."""
    gathered: list[MetricAccumulator] = [None] * group.size()
    dist.all_gather_object(gathered, local, group=group)
    everywhere = MetricAccumulator()
    everywhere.merge(gathered)
    return everywhere.values()


def _add_sums(metrics: MetricAccumulator, sums: dict[str, float]) -> None:
    metrics.add("train/grad_norm", sums["grad_norm"])
    metrics.add_sum("train/trained_tokens", sums["trained_tokens"])
    for name, total, count in (
        ("train/loss", "loss", "loss_count"),
        ("train/teacher_agreement", "agreements", "trained_tokens"),
        ("train/student_entropy", "student_entropy", "trained_tokens"),
        ("train/on_policy_gap", "on_policy_gap", "committed_tokens"),
        ("train/token_accuracy", "likeliest_tokens", "trained_tokens"),
    ):
        if total in sums and sums[count]:
            metrics.add(name, sums[total] / sums[count], weight=sums[count])
