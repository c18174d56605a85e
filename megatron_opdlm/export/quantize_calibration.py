"""What a model is calibrated with before it is quantized: its own responses, in the states that it was in.

    calibration = on_policy_calibration(engine, prompts, config, special, is_student=True)
    calibration.run(model)                              # clean and noisy streams, in the forward that training uses
    probes = calibration.probe(model)                   # before
    calibration.divergence_from(probes, model)          # after: mean KL(before || after) in nats

A block-diffusion student meets masked blocks that no text has, so text alone would leave those inputs out of the
scales. The teacher is causal and reads what it wrote.

Legend: `T` positions, `B` rows, `N` probed positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_opdlm.config.schema import Config, DivergenceConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.diffusion.state_selections import rows_per_trajectory
from megatron_opdlm.diffusion.states import OnPolicyStates, select_states
from megatron_opdlm.distillation.divergences import divergence_and_slopes
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.device import device
from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

NUM_PROBES = 512
"""Most positions whose logits are compared: of Qwen3's vocabulary they take 300 MiB in float32."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The states of this rank's share of the prompts, in micro-batches."""

    micro_batches: list[OnPolicyStates]
    is_student: bool
    """The student reads both streams; the teacher reads the clean one, causally."""
    vocab_size: int
    """Logits from here on are padding."""

    @torch.no_grad()
    def run(self, model: PipelineModel) -> None:
        """The model's forward over everything."""
        for states in self.micro_batches:
            self._hidden(model, states)

    @torch.no_grad()
    def probe(self, model: PipelineModel) -> torch.Tensor:
        """Log-probabilities `[N, V]` in float32 at the first of the trained positions, from the stream that is read."""
        return torch.cat(list(self._probes(model)))

    def divergence_from(self, before_NV: torch.Tensor, model: PipelineModel) -> float:
        """Mean KL(before || after) over the probed positions, in nats; `before_NV`, an earlier `probe`, is spent."""
        terms_N, _ = divergence_and_slopes(before_NV, self.probe(model), DivergenceConfig(kind="forward_kl"))
        return float(terms_N.mean()) if len(terms_N) else 0.0

    def counts(self) -> dict[str, int]:
        """What this rank calibrates with: `tokens` of the clean stream, `rows` of states, and `probed` positions."""
        trained = sum(int(states.is_trained_BT.sum()) for states in self.micro_batches)
        return {
            "tokens": sum(int(states.lengths_B.sum()) for states in self.micro_batches),
            "rows": sum(states.num_rows for states in self.micro_batches),
            "probed": min(NUM_PROBES, trained),
        }

    def _probes(self, model: PipelineModel) -> Iterator[torch.Tensor]:
        missing = NUM_PROBES
        for states in self.micro_batches:
            if missing > 0:
                hidden_BTH = self._hidden(model, states).transpose(0, 1)[-states.num_rows :]  # the noisy ones, of two
                chosen_NH = hidden_BTH[states.is_trained_BT.to(hidden_BTH.device)][:missing]
                logits_NV = model.vocab_parallel_logits(chosen_NH)[:, : self.vocab_size]
                yield logits_NV.float().log_softmax(-1)
                missing -= len(chosen_NH)

    def _hidden(self, model: PipelineModel, states: OnPolicyStates) -> torch.Tensor:
        states = states.to(device())
        positions_T = torch.arange(states.clean_ids_BT.shape[1], device=device())
        if not self.is_student:
            return model(states.clean_ids_BT, positions_T, None)
        return model(torch.cat([states.clean_ids_BT, states.noisy_ids_BT]), positions_T, states.lengths_B)


def on_policy_calibration(
    engine: RolloutEngine, prompts: list[Prompt], config: Config, special: SpecialTokens, *, is_student: bool
) -> Calibration:
    """The engine's responses to `prompts`, and the states of `config.states` in which it was.

    All ranks must call it; each gets its share.
    """
    rollout = engine.rollout
    trajectories = engine.generate([RolloutTask(prompt, rollout.max_new_tokens) for prompt in prompts], step=0)
    num_rows, size = rows_per_trajectory(config.states, rollout.denoising_steps_per_block), rollout.block_size
    width = config.training.micro_batch_size
    micro_batches = [
        select_states(
            trajectories[start : start + width],
            config.states,
            num_rows=num_rows,
            block_size=size,
            mask_token_id=special.mask_token_id,
            end_token_ids=special.end_token_ids,
            pad_token_id=special.pad_token_id,
            seed=config.training.seed,
            step=0,
        ).padded_to(size)
        for start in range(0, len(trajectories), width)
    ]
    return Calibration(micro_batches, is_student, special.vocab_size)
