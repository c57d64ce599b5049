"""The memory processes of a job on this node: started, found, connected to, ended."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from stowplan.core.errors import StowplanError
from stowplan.runtime.snapshot.layouts import Found, RankLayout, memory_on, processes_on
from stowplan.runtime.snapshot.memory.client import SnapshotClient
from stowplan.runtime.snapshot.memory.connection import start_or_connect
from stowplan.runtime.snapshot.place import Place

__all__ = ["JobProcesses"]


@dataclass(slots=True)
class JobProcesses:
    """Of one rank of a run. ``generation`` is that of this start of the job, once all ranks have agreed on it."""

    run: str
    place: Place
    layout: RankLayout
    listen: str
    idle_seconds: float
    generation: int = 0

    def start(self) -> int:
        """Have one for this layout on this node; the least generation that is newer than all that it has heard of.

        Generations are seconds since 1970 at least, so that nodes which were away do not come back with newer ones.
        """
        connection = start_or_connect(
            self.run, self.layout.process(self.place.node), None, self.place.local_size,
            idle_seconds=self.idle_seconds, listen=self.listen,
        )  # fmt: skip
        known = connection.welcome.generation
        connection.close()
        others = (status.generation for _, status in processes_on(self.run, self.place.node))
        return max(known + 1, *(other + 1 for other in others), int(time.time()))

    def connected(self, process: str, local_rank: int, local_size: int) -> SnapshotClient:
        """A client of one of them, of this generation."""
        return SnapshotClient(
            self.run, local_rank, node=process, num_ranks=local_size, generation=self.generation,
            idle_seconds=self.idle_seconds, listen=self.listen,
        )  # fmt: skip

    def own(self) -> SnapshotClient:
        """Of this rank's memory."""
        return self.connected(self.layout.process(self.place.node), self.place.local_rank, self.place.local_size)

    def found(self) -> list[Found]:
        """What is held on this node; one rank of each node looks."""
        return memory_on(self.run, self.place.node) if self.place.local_rank == 0 else []

    def end(self, *, former_only: bool = False) -> None:
        """End those of this node, or those of other layouts; one rank of each node does. Nothing is raised."""
        if self.place.local_rank:
            return
        with contextlib.suppress(StowplanError, OSError):
            for layout, status in processes_on(self.run, self.place.node):
                if not (former_only and layout == self.layout):
                    with contextlib.suppress(StowplanError, OSError):
                        self.connected(status.node, 0, status.num_ranks).end()
