"""Rotary position embedding of queries and keys, with the numerics of Megatron's unfused one.

Megatron works cosines and sines out again for the queries and for the keys of every layer. That is nothing beside a
training step's products, and a good part of a decoding step's time; while the student decodes they are made once a
forward, and queries and keys turn together:

    rotation = Rotation.by(angles_TD, dtype)
    turned_TGJD = rotation.of(heads_TGJD)

Legend: `T` tokens, `G` key-value heads, `J` the heads of a group, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotation:
    """By how much the vector of each token is turned."""

    cos_T11D: torch.Tensor
    signed_sin_T11D: torch.Tensor
    """Negative in the first half, which takes the second half's numbers with the opposite sign."""

    @classmethod
    def by(cls, angles_TD: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """By these angles, the same in both halves of D; for vectors of the type `dtype`."""
        cos_TD, sin_TD = angles_TD.cos().to(dtype), angles_TD.sin().to(dtype)
        first_half, second_half = sin_TD.chunk(2, dim=-1)
        return cls(cos_TD[:, None, None], torch.cat([-first_half, second_half], dim=-1)[:, None, None])

    def of(self, heads_TGJD: torch.Tensor) -> torch.Tensor:
        """The queries and keys, turned: element i of the first half together with element i of the second."""
        halves_swapped = heads_TGJD.roll(heads_TGJD.shape[-1] // 2, dims=-1)
        return (heads_TGJD * self.cos_T11D).add_(halves_swapped.mul_(self.signed_sin_T11D))
