"""SIGTERM as a question that the training loop asks: a cluster wants its machines back, and gives us a little time.

    with Interruption(grace_seconds=25) as interruption:
        while not interruption.is_requested():          # all ranks get the same answer
            ...

The signal may reach one rank only, and any rank may be deep in a collective when it comes. So a thread waits for it,
the ranks agree between two phases of a step, and if that takes too long the thread ends the process: better the last
checkpoint than one that another signal cuts off.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading

import torch
import torch.distributed as dist

from megatron_opdlm.parallel.device import device

logger = logging.getLogger(__name__)

EXIT_CODE = 128 + signal.SIGTERM
"""Of a run that was told to stop, as shells report it."""
LAST_WORDS_SECONDS = 1.0
"""For what the log says of a run that could not save in time."""


class Interruption:
    """Listens for SIGTERM from `with` on. In a process's main thread; all ranks must make one."""

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self._received, self._over = threading.Event(), threading.Event()

    def is_received(self) -> bool:
        """Whether this rank has been told to stop. Others may not have been; `is_requested` knows."""
        return self._received.is_set()

    def is_requested(self) -> bool:
        """Whether any rank has been told to stop. All ranks must call it, and get the same answer."""
        flag = torch.tensor(int(self.is_received()), device=device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def __enter__(self) -> Interruption:
        # A Python handler runs only when the main thread is between two instructions of Python, which it is not while
        # it waits for other ranks. The number of the signal arrives at the socket in any case.
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="SIGTERM", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGTERM, self._handler)
        self._writing.close()  # which ends the thread
        self._thread.join()
        self._reading.close()

    def _listen(self) -> None:
        while received := self._reading.recv(64):
            if signal.SIGTERM in received and not self._received.is_set():
                logger.warning("SIGTERM: saving and leaving within %g s", self.grace_seconds)
                self._received.set()
                threading.Thread(target=self._leave_in_time, name="grace", daemon=True).start()

    def _leave_in_time(self) -> None:
        if not self._over.wait(self.grace_seconds):
            # Whoever reads the log may be gone or stuck, and a write that waits for them must not keep the process.
            words = threading.Thread(target=self._last_words, name="last words", daemon=True)
            words.start()
            words.join(LAST_WORDS_SECONDS)
            os._exit(EXIT_CODE)

    def _last_words(self) -> None:
        logger.error("training.grace_seconds (%g) are over: what is not saved is lost", self.grace_seconds)
        logging.shutdown()
