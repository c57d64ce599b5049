"""An ``Agreement`` between threads of one process instead of ranks of a job."""

from __future__ import annotations

import threading

from stowplan.runtime.snapshot.place import Agreement

PATIENCE_SECONDS = 100


def of_threads(world_size: int) -> type[Agreement]:
    """A class of them; each thread first sets ``ranks.rank``, then makes its own."""

    class Threads(Agreement):
        barrier = threading.Barrier(world_size)
        words: dict = {}  # noqa: RUF012 - shared on purpose
        ranks = threading.local()

        def __init__(self):
            self.rank, self.world_size = self.ranks.rank, world_size

        def gather(self, word):
            self.words[self.rank] = word
            self.barrier.wait(PATIENCE_SECONDS)
            found = [self.words[rank] for rank in range(world_size)]
            self.barrier.wait(PATIENCE_SECONDS)
            return found

        def broadcast(self, buffer, source):
            buffer.copy_(self.gather(buffer)[source])
            self.gather(None)

    return Threads
