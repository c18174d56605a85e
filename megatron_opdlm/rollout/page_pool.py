"""Who owns which page of the key-value cache.

The cache is cut into pages of a fixed number of tokens. A sequence gets another page when it grows into one, and gives
all of them back when it is done, so sequences of any length share the memory without leaving holes in it.

    >>> pool = PagePool(range(1, 4), num_slots=2, max_pages=3, page_size=4)
    >>> pool.grow(0, num_tokens=5), pool.num_free
    (True, 1)
    >>> pool.page_table_BP.tolist()
    [[1, 2, 0], [0, 0, 0]]
    >>> pool.grow(1, num_tokens=8), pool.num_free
    (False, 1)
"""

from __future__ import annotations

import torch


class PagePool:
    """The pages of some slots. Page 0 of a cache is nobody's: unused places of a page table point there."""

    def __init__(self, pages: range, num_slots: int, max_pages: int, page_size: int) -> None:
        assert 0 not in pages, "page 0 belongs to nobody"
        self.page_size, self.num_pages = page_size, len(pages)
        self.page_table_BP = torch.zeros(num_slots, max_pages, dtype=torch.long)
        """The pages of each slot, in the order of the positions that they hold."""
        self.capacity_B = torch.zeros(num_slots, dtype=torch.long)
        """Tokens that each slot's pages hold."""
        self.peak = 0
        """Most pages that were taken at one time."""
        self._free = list(reversed(pages))

    @property
    def num_free(self) -> int:
        """Pages that no slot has."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def grow(self, slot: int, num_tokens: int) -> bool:
        """Gives the slot what it lacks to hold so many tokens; False, and nothing, if there is too little."""
        has = int(self.capacity_B[slot]) // self.page_size
        needs = self.pages_for(num_tokens)
        if needs - has > len(self._free):
            return False
        for place in range(has, needs):
            self.page_table_BP[slot, place] = self._free.pop()
        self.capacity_B[slot] = max(has, needs) * self.page_size
        self.peak = max(self.peak, self.num_pages - len(self._free))
        return True

    def release(self, slot: int) -> None:
        """Takes all pages of a slot back."""
        has = int(self.capacity_B[slot]) // self.page_size
        self._free.extend(reversed(self.page_table_BP[slot, :has].tolist()))
        self.page_table_BP[slot] = 0
        self.capacity_B[slot] = 0
