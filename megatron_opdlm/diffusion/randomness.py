"""Random numbers that belong to one sequence, so that a run's numbers do not depend on how it is spread out.

Every sequence draws from its own generator, seeded from what identifies the sequence. What a prompt yields is then the
same whatever else is in its batch, on any number of data-, tensor- or pipeline-parallel ranks, and after a restart:
there is no shared stream whose position would have to be saved.

Example: what the rollout draws for prompt 7 in training step 3.

    >>> generator = sequence_generator(1234, 3, 7, 0, purpose="rollout")
    >>> torch.rand(2, generator=generator).tolist() == torch.rand(
    ...     2, generator=sequence_generator(1234, 3, 7, 0, purpose="rollout")
    ... ).tolist()
    True
"""

from __future__ import annotations

import hashlib

import torch


def sequence_seed(seed: int, step: int, prompt_id: int, sample_index: int, *, purpose: str) -> int:
    """A seed in [0, 2**63) that is the same in every process, Python version and machine.

    Args:
        seed: `training.seed`.
        step: the training step, so that a prompt of a later epoch is decoded afresh.
        prompt_id: row of the prompt in the data set.
        sample_index: which response to that prompt.
        purpose: what is drawn ("rollout", "states"); different purposes are independent of each other.

    Example:
        >>> sequence_seed(1234, 3, 7, 0, purpose="rollout")
        4963321789710316435
    """
    name = f"{seed}/{step}/{prompt_id}/{sample_index}/{purpose}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sequence_generator(seed: int, step: int, prompt_id: int, sample_index: int, *, purpose: str) -> torch.Generator:
    """A CPU generator at the start of the stream of one sequence; the arguments are those of `sequence_seed`.

    PyTorch's CPU generator takes the low 32 bits of a seed. Two given sequences share a stream with probability
    2**-32, which does no harm: they would only see the same uniform numbers.
    """
    return torch.Generator().manual_seed(sequence_seed(seed, step, prompt_id, sample_index, purpose=purpose))
