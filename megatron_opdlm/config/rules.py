"""The forms that most rules about settings have; each says what is wrong in the same words.

at_least(1, "rollout", block_size=rollout.block_size)      # rollout.block_size (0) must be at least 1
"""

from __future__ import annotations


def require(holds: object, message: str) -> None:
    """ValueError with the message unless it holds."""
    if not holds:
        raise ValueError(message)


def at_least(minimum: float, section: str, **settings: float | None) -> None:
    """ValueError for the first of a section's settings that is too low; null passes."""
    for name, value in settings.items():
        require(value is None or value >= minimum, f"{section}.{name} ({value}) must be at least {minimum}")


def within(low: float, high: float, section: str, **settings: float) -> None:
    """ValueError for the first of a section's settings that is out of bounds."""
    for name, value in settings.items():
        require(low <= value <= high, f"{section}.{name} ({value}) must lie between {low} and {high}")
