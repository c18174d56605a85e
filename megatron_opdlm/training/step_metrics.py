"""What a training step tells: quality of the rollout, loss, costs; and totals over the run.

metrics = StepMetrics(student_architecture, teacher_architecture, groups.dp)
metrics.of_step(trajectories, step_sums, timers.seconds(), lr=1e-5, length_limit=256)     # {"train/loss": ...}
"""

from __future__ import annotations

import torch.distributed as dist

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.models.qwen3 import Qwen3Architecture
from megatron_opdlm.observability import throughput
from megatron_opdlm.observability.metrics import MetricAccumulator


class StepMetrics:
    """Turns a step's trajectories and sums into named numbers, the same on all data-parallel ranks."""

    def __init__(self, student: Qwen3Architecture, teacher: Qwen3Architecture, group: dist.ProcessGroup) -> None:
        self.student, self.teacher = _shape(student), _shape(teacher)
        self.student_parameters = throughput.num_parameters(self.student, student.tie_word_embeddings)
        self.teacher_parameters = throughput.num_parameters(self.teacher, teacher.tie_word_embeddings)
        self.group = group
        self.totals = dict.fromkeys(("rollout/total_tokens", "perf/total_paper_flops", "perf/total_true_flops"), 0.0)

    def of_step(
        self,
        trajectories: list[Trajectory],
        step_sums: list[dict[str, float]],
        seconds: dict[str, float],
        *,
        lr: float,
        length_limit: int,
    ) -> dict[str, float]:
        """The metrics of one step. All ranks must call it: it gathers over the data-parallel group.

        `step_sums` has, for each optimizer step, what `TrainStep` returned; `seconds` are this rank's own.
        """
        local = MetricAccumulator()
        for trajectory in trajectories:
            self._add_trajectory(local, trajectory)
        for sums in step_sums:
            _add_sums(local, sums)
        gathered: list[MetricAccumulator] = [None] * self.group.size()
        dist.all_gather_object(gathered, local, group=self.group)
        everywhere = MetricAccumulator()
        everywhere.merge(gathered)
        values = everywhere.values()
        values |= {"train/lr": lr, "rollout/length_limit": length_limit}
        values |= {f"perf/seconds_{phase}": value for phase, value in seconds.items()}
        values["perf/paper_flops"] = throughput.paper_flops(
            self.student_parameters, self.teacher_parameters, int(values["rollout/tokens"])
        )
        values["perf/tokens_per_second"] = values["rollout/tokens"] / seconds["total"]
        for total in self.totals:
            self.totals[total] += values[total.replace("total_", "")]
        return values | self.totals

    def state_dict(self) -> dict[str, float]:
        """The totals over the run."""
        return dict(self.totals)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on counting from `state`."""
        assert state.keys() == self.totals.keys(), f"totals {sorted(state)} are not {sorted(self.totals)}"
        self.totals = dict(state)

    def _add_trajectory(self, metrics: MetricAccumulator, trajectory: Trajectory) -> None:
        metrics.add("rollout/tokens_per_step", trajectory.tokens_per_step, weight=trajectory.num_steps)
        metrics.add("rollout/response_length", trajectory.response_length)
        metrics.add("rollout/end_token_fraction", trajectory.stop_reason == "end_token")
        metrics.add_sum("rollout/tokens", trajectory.response_length)
        metrics.add_sum("perf/true_flops", self._true_flops(trajectory))

    def _true_flops(self, trajectory: Trajectory) -> int:
        """Rollout, teacher and student's training of one sequence; every counted token taken as trained."""
        num_tokens, block_size = len(trajectory.terminal_ids_T), trajectory.block_size
        steps_by_block = trajectory.steps_by_block_MK
        return (
            throughput.rollout_flops(
                self.student,
                trajectory.prompt_length,
                steps_by_block.amax(1).tolist(),
                int(steps_by_block.sum()),
                block_size,
            )
            + throughput.teacher_flops(self.teacher, num_tokens, trajectory.response_length)
            + throughput.student_training_flops(self.student, num_tokens, trajectory.response_length, block_size)
        )


def _add_sums(metrics: MetricAccumulator, sums: dict[str, float]) -> None:
    metrics.add("train/grad_norm", sums["grad_norm"])
    metrics.add("train/loss", sums["loss"] / sums["rows"], weight=sums["rows"])
    metrics.add_sum("train/trained_tokens", sums["trained_tokens"])
    for name, total, count in (
        ("train/teacher_agreement", "agreements", "trained_tokens"),
        ("train/on_policy_gap", "on_policy_gap", "committed_tokens"),
    ):
        if sums[count]:
            metrics.add(name, sums[total] / sums[count], weight=sums[count])


def _shape(architecture: Qwen3Architecture) -> throughput.ModelShape:
    return throughput.ModelShape(
        num_layers=architecture.num_hidden_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        head_dim=architecture.head_dim,
        ffn_hidden_size=architecture.intermediate_size,
        vocab_size=architecture.vocab_size,
    )
