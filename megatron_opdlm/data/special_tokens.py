"""The token ids that decoding and training treat in a way of their own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of a student's tokenizer."""

    vocab_size: int
    """Ids from here on are padding of the embedding and take part in nothing."""
    mask_token_id: int
    """Stands at positions that are still to be decoded; never drawn, never a target."""
    end_token_ids: tuple[int, ...]
    """Each of them ends a response."""
    pad_token_id: int
    """Fills rows of a batch on the right; any valid id, since padding is neither attended nor trained."""
