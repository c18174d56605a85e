"""Several pieces of work that share a pipeline stage by taking turns.

A piece is a generator. It yields where it would have to wait for another stage, so that the next piece can use this
one meanwhile. All stages hold the same pieces and run them in the same order, so what one stage sends is what the
next one expects.

    >>> def count(name, to):
    ...     for number in range(to):
    ...         print(name, number)
    ...         yield
    >>> take_turns([count("a", 2), count("b", 1)])
    a 0
    b 0
    a 1
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable

Work = Generator[None, None, None]
"""A piece of work; `yield from` composes it from smaller ones, which may return something."""


def take_turns(pieces: Iterable[Work]) -> None:
    """Runs each piece up to its next yield, one after the other, round after round, until all are done."""
    waiting = deque(pieces)
    while waiting:
        piece = waiting.popleft()
        try:
            next(piece)
        except StopIteration:
            continue
        waiting.append(piece)
