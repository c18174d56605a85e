"""One rolled-out sequence: which tokens the student wrote, and in which denoising step it committed each of them.

A `Trajectory` travels as integer tensors from the sampler to the loss. It never becomes text on the way: tokenizing
again would shift the step map and lose special tokens.

Example: a prompt of 2 tokens and a response in blocks of 4. Block 0 took 1 step for its two response tokens; block 1
committed its second token first, then the two beside it, then the last. The end token is 9.

    >>> trajectory = Trajectory(
    ...     prompt_id=12,
    ...     sample_index=0,
    ...     prompt_length=2,
    ...     block_size=4,
    ...     terminal_ids_T=torch.tensor([3, 5, 7, 6, 8, 4, 9, 1]),
    ...     step_map_R=torch.tensor([1, 1, 2, 1, 2, 3]),
    ...     log_probs_R=torch.tensor([-0.5, -0.25, -1.0, -0.125, -0.5, -2.0]),
    ...     response_length=5,
    ...     stop_reason="end_token",
    ...     domain="math",
    ... )
    >>> trajectory.response_ids.tolist()
    [7, 6, 8, 4, 9]
    >>> trajectory.steps_by_block_MK.tolist()
    [[0, 0, 1, 1], [2, 1, 2, 3]]
    >>> trajectory.num_steps, trajectory.tokens_per_step
    (4, 1.25)

Legend: `T` terminal sequence (`P` prompt + `R` response), `M` blocks that hold response tokens, `K` positions of one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import torch

from megatron_opdlm.diffusion.blocks import block_index, block_start, round_up_to_grid

STOP_REASONS = ("end_token", "length", "given", "not_finite")
REPEATED = 4
"""Tokens in a row that count as a repetition."""
_TENSOR_DTYPES = {"terminal_ids_T": torch.int64, "step_map_R": torch.int64, "log_probs_R": torch.float32}


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A terminal sequence with its step map; all tensors on the CPU. The module's docstring works through one."""

    prompt_id: int
    """Row of the prompt in the data set."""
    sample_index: int
    """Which response to that prompt, from 0."""
    prompt_length: int
    """P, in tokens."""
    block_size: int
    """K of the grid it was decoded on."""
    terminal_ids_T: torch.Tensor
    """int64 [T]: prompt and fully denoised response, whole blocks: also what follows the end token in the last one."""
    step_map_R: torch.Tensor
    """int64 [R], R = T - P: the denoising step, from 1 *within its block*, that committed the token."""
    log_probs_R: torch.Tensor
    """float32 [R]: the raw log-probability (temperature 1, unfiltered) the token had when it was committed."""
    response_length: int
    """Response tokens that count: up to and including the first end token, cut at the length limit."""
    stop_reason: str
    """One of `STOP_REASONS`: "end_token", "length" where the limit came first, "given" if it was not rolled out, or
    "not_finite": in its last block a logit was not, so that what stands there means nothing. It is trained nowhere."""
    domain: str
    """Of the prompt; "" if its row names none."""

    def __post_init__(self) -> None:
        num_tokens, num_response = len(self.terminal_ids_T), len(self.step_map_R)
        for name, dtype in _TENSOR_DTYPES.items():
            tensor = getattr(self, name)
            assert tensor.dtype == dtype and tensor.ndim == 1, f"{name} must be {dtype} with one axis"
        assert num_tokens % self.block_size == 0, f"{num_tokens} tokens are not whole blocks of {self.block_size}"
        assert self.prompt_length + num_response == num_tokens, "the step map covers the response, no less, no more"
        assert len(self.log_probs_R) == num_response, "one log-probability per response token"
        assert 1 <= self.response_length <= num_response, f"{self.response_length} of {num_response} tokens count"
        assert int(self.step_map_R.min()) >= 1, "steps count from 1, and every response token was committed in one"
        assert self.stop_reason in STOP_REASONS, f"{self.stop_reason} is not one of {STOP_REASONS}"

    @classmethod
    def given(
        cls,
        *,
        prompt_id: int,
        sample_index: int,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        max_new_tokens: int,
        fill_token_id: int,
        block_size: int,
        domain: str,
    ) -> Trajectory:
        """A sequence that the student did not write, on its grid. `response_ids` must not be empty.

        At most `max_new_tokens` of the response count; what follows them in the last block are its own tokens. Where
        these run out, `fill_token_id` follows, an end token: the likeliest thing for the student itself to write there.
        The step map and the log-probabilities mean nothing.
        """
        num_counted = min(len(response_ids), max_new_tokens)
        num_tokens = round_up_to_grid(len(prompt_ids) + num_counted, block_size)
        ids_T = torch.full((num_tokens,), fill_token_id, dtype=torch.int64)
        written = torch.tensor([*prompt_ids, *response_ids][:num_tokens], dtype=torch.int64)
        ids_T[: len(written)] = written
        num_response = num_tokens - len(prompt_ids)
        return cls(
            prompt_id=prompt_id,
            sample_index=sample_index,
            prompt_length=len(prompt_ids),
            block_size=block_size,
            terminal_ids_T=ids_T,
            step_map_R=torch.ones(num_response, dtype=torch.int64),
            log_probs_R=torch.zeros(num_response),
            response_length=num_counted,
            stop_reason="given",
            domain=domain,
        )

    @property
    def is_given(self) -> bool:
        """Whether the student did not write it."""
        return self.stop_reason == "given"

    @property
    def response_ids(self) -> torch.Tensor:
        """The response tokens that count, int64 [response_length]."""
        return self.terminal_ids_T[self.prompt_length : self.prompt_length + self.response_length]

    @property
    def steps_by_block_MK(self) -> torch.Tensor:
        """The step map on the absolute grid, int64 [M, K]; 0 at the prompt tokens of the first of these blocks."""
        num_prompt_tokens = self.prompt_length - block_start(self.prompt_length, self.block_size)
        prompt_steps = torch.zeros(num_prompt_tokens, dtype=torch.int64)
        return torch.cat([prompt_steps, self.step_map_R]).view(-1, self.block_size)

    @property
    def num_blocks(self) -> int:
        """Blocks that hold a token that counts."""
        first_block = block_index(self.prompt_length, self.block_size)
        return block_index(self.prompt_length + self.response_length - 1, self.block_size) - first_block + 1

    @property
    def num_steps(self) -> int:
        """Denoising steps of these blocks."""
        return int(sort_steps(self.steps_by_block_MK[: self.num_blocks])[1].sum())

    @property
    def tokens_per_step(self) -> float:
        """Counted tokens per denoising step: 1 for a decoder that commits one token at a time."""
        return self.response_length / self.num_steps

    @property
    def repetition_rate(self) -> float:
        """The share of its counted runs of `REPEATED` tokens that stood in it before; 0 where it is shorter than one.

        Example: "abcabcabc" has six runs of four letters, of which three are new: 0.5.
        """
        ids = self.response_ids.tolist()
        runs = [tuple(ids[start : start + REPEATED]) for start in range(len(ids) - REPEATED + 1)]
        return 1 - len(set(runs)) / len(runs) if runs else 0.0

    def to_json(self) -> str:
        """One line of JSON, for files that people look into. `from_json` gives the same numbers back, bit for bit."""
        # A float32 is exactly a Python float, which JSON writes with as many digits as it takes to read it back.
        columns = {name: getattr(self, name).tolist() for name in _TENSOR_DTYPES}
        return json.dumps(asdict(self) | columns)

    @classmethod
    def from_json(cls, line: str) -> Trajectory:
        """The trajectory that `to_json` wrote. Raises ValueError if a field is missing or unknown."""
        values = json.loads(line)
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"a trajectory has exactly the fields {', '.join(sorted(names))}; this line differs")
        columns = {name: torch.tensor(values[name], dtype=dtype) for name, dtype in _TENSOR_DTYPES.items()}
        return cls(**(values | columns))


def sort_steps(steps_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each block's steps in ascending order, and where in that order a step occurs for the first time.

    The steps at those places are the *realised* denoising steps of the block; 0 (prompt) is none.

    Args:
        steps_MK: int64 [M, K], as `Trajectory.steps_by_block_MK`.

    Returns:
        int64 [M, K] and bool [M, K].

    Example:
        >>> sorted_MK, is_first_MK = sort_steps(torch.tensor([[0, 2, 1, 2]]))
        >>> sorted_MK.tolist(), is_first_MK.tolist()
        ([[0, 1, 2, 2]], [[False, True, True, False]])
    """
    sorted_MK = steps_MK.sort(dim=1).values
    # The zero in front makes the first step of a block differ from its left neighbour, and leaves the prompt out.
    before_MK = torch.nn.functional.pad(sorted_MK, (1, -1))
    return sorted_MK, sorted_MK != before_MK
