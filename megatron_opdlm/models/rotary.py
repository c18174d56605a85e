"""Rotary position embedding of queries and keys, with the numerics of Megatron's unfused one.

Megatron works cosines and sines out again for the queries and for the keys of every layer. That is nothing beside a
training step's products, and a good part of a decoding step's time; while the student decodes they are made once a
forward, and queries and keys turn together:

    rotation = Rotation.by(angles_TD, dtype)
    query_TND, key_TGD = rotation.of(query_TND, key_TGD)

Legend: `T` tokens, `N` heads, `G` key-value heads, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotation:
    """By how much the vector of each token is turned."""

    cos_T1D: torch.Tensor
    signed_sin_T1D: torch.Tensor
    """Negative in the first half, which takes the second half's numbers with the opposite sign."""

    @classmethod
    def by(cls, angles_TD: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """By these angles, the same in both halves of D; for vectors of the type `dtype`."""
        cos_TD, sin_TD = angles_TD.cos().to(dtype), angles_TD.sin().to(dtype)
        first_half, second_half = sin_TD.chunk(2, dim=-1)
        return cls(cos_TD[:, None], torch.cat([-first_half, second_half], dim=-1)[:, None])

    def of(self, query_TND: torch.Tensor, key_TGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries and the keys, turned: element i of the first half together with element i of the second."""
        both = torch.cat([query_TND, key_TGD], dim=1)
        halves_swapped = both.roll(both.shape[-1] // 2, dims=-1)
        turned = (both * self.cos_T1D).add_(halves_swapped.mul_(self.signed_sin_T1D))
        return turned.split([query_TND.shape[1], key_TGD.shape[1]], dim=1)
