"""The order in which prompts are used: shuffled anew in every epoch, and the same again after a restart.

The order of an epoch depends on nothing but the seed and the epoch, not even on the version of a library, and the
stream's place in it is one number: how many prompts it has given out. A resumed run therefore goes on with exactly
the prompts that the first one would have used.

Example:

    >>> stream = PromptStream(num_prompts=5, batch_size=2, seed=1234)
    >>> stream.next_batch(), stream.next_batch(), stream.next_batch()
    ([2, 3], [0, 4], [1, 0])
    >>> stream.state_dict()
    {'num_prompts': 5, 'seed': 1234, 'num_drawn': 6}
"""

from __future__ import annotations

from hashlib import blake2b


class PromptStream:
    """Batches of prompt indices, without end.

    A batch may run across the end of an epoch: every prompt comes exactly once per epoch, and none is dropped. So a
    prompt can be in a batch twice, at the seam of two epochs or because `batch_size` is larger than `num_prompts`.
    """

    def __init__(self, num_prompts: int, batch_size: int, seed: int) -> None:
        """
        Args:
            num_prompts: length of the list that the indices point into.
            batch_size: prompts per batch; more than `num_prompts` takes several epochs per batch.
            seed: `training.seed`.
        """
        assert num_prompts >= 1 and batch_size >= 1, f"{batch_size} of {num_prompts} prompts: nothing to draw"
        self.num_prompts = num_prompts
        self.batch_size = batch_size
        self.seed = seed
        self.num_drawn = 0
        self._order: list[int] = []
        self._order_epoch = -1

    @property
    def epoch(self) -> int:
        """Epochs that were given out completely."""
        return self.num_drawn // self.num_prompts

    def next_batch(self) -> list[int]:
        """The next `batch_size` indices, each in [0, num_prompts)."""
        batch: list[int] = []
        while len(batch) < self.batch_size:
            place = self.num_drawn % self.num_prompts
            taken = self._order_of(self.epoch)[place : place + self.batch_size - len(batch)]
            batch += taken
            self.num_drawn += len(taken)
        return batch

    def state_dict(self) -> dict[str, int]:
        """What a resumed stream needs. The batch size is not in it: a run may go on with another one."""
        return {"num_prompts": self.num_prompts, "seed": self.seed, "num_drawn": self.num_drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the stream that gave `state` stood.

        Raises:
            ValueError: keys are missing or unknown, or the data or the seed are not those of that stream.
        """
        expected = self.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(f"the prompt stream's state must have the keys {list(expected)}, not {list(state)}")
        if state["num_prompts"] != self.num_prompts:
            saved = f"the checkpoint was written with {state['num_prompts']} prompts"
            raise ValueError(f"data.train_files has {self.num_prompts} prompts, but {saved}: the order would differ")
        if state["seed"] != self.seed:
            saved = f"the checkpoint was written with {state['seed']}"
            raise ValueError(f"training.seed is {self.seed}, but {saved}: the order would differ")
        self.num_drawn = state["num_drawn"]

    def _order_of(self, epoch: int) -> list[int]:
        if epoch != self._order_epoch:
            self._order = shuffled_indices(self.num_prompts, self.seed, epoch)
            self._order_epoch = epoch
        return self._order


def shuffled_indices(num_prompts: int, seed: int, epoch: int) -> list[int]:
    """The indices below `num_prompts`, in the order of their hashes under this seed and epoch.

    Unlike a generator's shuffle this cannot change with the version of Python or PyTorch, so a run can be resumed in
    another container.
    """

    def hash_of(index: int) -> bytes:
        return blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()

    return sorted(range(num_prompts), key=hash_of)
