"""One rank's memory for snapshots over a job's life: joined, reserved, grown, given back to new memory processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from stowplan.core.errors import RankFailed, SnapshotMemoryUnavailable, SnapshotProcessUnavailable
from stowplan.runtime.snapshot.exchange.limits import SnapshotLimits
from stowplan.runtime.snapshot.former import taken_over
from stowplan.runtime.snapshot.job_processes import JobProcesses
from stowplan.runtime.snapshot.layouts import Found, RankLayout, numbered, own_memory
from stowplan.runtime.snapshot.members import Member, Members
from stowplan.runtime.snapshot.memory.client import SnapshotClient
from stowplan.runtime.snapshot.memory.messages import RankStatus
from stowplan.runtime.snapshot.memory.region import check_available
from stowplan.runtime.snapshot.pinning import page_locked
from stowplan.runtime.snapshot.place import Agreement, CodeGroup, failed_with
from stowplan.runtime.snapshot.reservation import Reservation, SlotBytes

__all__ = ["JobMemory"]

_LONGEST_PAUSE_SECONDS = 600.0  # asking a process that hangs takes up to a minute


class JobMemory:
    """All ranks make one, of the same generation, and call its methods at the same time but where it says otherwise.

    Attributes:
        client: of this rank's memory.
        members: the layout's, of which this rank takes care of one.
        former: those of another layout, until there is a snapshot of this one.
        group: the ranks that the code is over, of which this is one; None where there is no code.
        capacity: what a slot holds, the same on all ranks; None: nothing is reserved.
        connected: whether the exchange between nodes is.
    """

    def __init__(self, agreement: Agreement, processes: JobProcesses, limits: SnapshotLimits) -> None:
        self._agreement, self.processes, self._limits = agreement, processes, limits
        self.client, self.members, index = self._joined()
        self.group = self._grouped(index)
        self.former: Members | None = None
        self.capacity: Reservation | None = None
        self.connected = True
        self._unlock: Callable[[], object] | None = None
        self._rejoin_at = self._rejoin_seconds = 0.0

    def _joined(self) -> tuple[SnapshotClient, Members, int]:
        """A client, and where it is: the node of this rank has the number that its memory has, if it has any."""
        processes, place = self.processes, self.processes.place
        made: list[SnapshotClient] = []

        def join() -> tuple[str, list[Found]]:
            made.append(processes.own())
            return place.node, processes.found()

        found = {node: each for node, each in self._agreement.together("joining memory processes", join) if each}
        index = numbered(place.nodes, processes.layout, found)[place.node]
        held = own_memory(place.node, processes.layout, found.get(place.node, ()))
        if held and held.index != index:
            made[0].roll_back(0)  # another node has that number, with newer snapshots
        clients = {Member(index, place.local_rank): made[0]}
        return made[0], Members(self._agreement, clients, processes.layout.code, self._limits), index

    def _grouped(self, index: int) -> CodeGroup | None:
        code, local_rank = self.processes.layout.code, self.processes.place.local_rank
        if code is None:
            return None
        words = sorted((*word, rank) for rank, word in enumerate(self._agreement.gather((local_rank, index))))
        return CodeGroup(tuple(rank for local, _, rank in words if local == local_rank), index, code.m)

    def holds(self, needed: SlotBytes) -> bool:
        """Whether a snapshot of this size has room in what is reserved."""
        return self.capacity is not None and self.capacity.holds(needed, self.processes.layout.code)

    def own(self) -> RankStatus | None:
        """What the memory process says of this rank's memory; None before any is reserved. For one rank alone."""
        ranks = self.client.status().ranks
        return next((rank for rank in ranks if rank.rank == self.processes.place.local_rank), None)

    def rejoined(self, lost: SnapshotProcessUnavailable) -> RankStatus | None:
        """Have a new memory process take this rank's memory over; after failures not at once again. For one rank alone.

        Raises SnapshotProcessUnavailable, SnapshotRefused, OSError.
        """
        now = time.monotonic()
        if now < self._rejoin_at:
            raise SnapshotProcessUnavailable(f"{lost} It is tried again in {self._rejoin_at - now:.0f} s.")
        self._rejoin_seconds = min(_LONGEST_PAUSE_SECONDS, max(1.0, 2 * self._rejoin_seconds))
        self._rejoin_at = now + self._rejoin_seconds
        if self.client.adopt() and self._unlock:  # another mapping of the same memory
            self._unlock = page_locked(self.client.memory)
        self._rejoin_at = self._rejoin_seconds = 0.0
        return self.own()

    def meet(self) -> None:
        """Connect the exchange between nodes anew. Raises what kept any rank from it."""
        self.connected = False
        self.members.meet()
        self.connected = True

    def roll_back(self, sequence: int) -> None:
        """Give up what is newer, on all ranks."""
        self._agreement.together("discarding snapshots", lambda: self.client.roll_back(sequence))

    def reserve(self, needed: SlotBytes) -> None:
        """Memory of another size, for which what is there is given up; also what a job of long ago has left."""
        self.roll_back(0)
        self.reserve_exactly(Reservation.of(needed.with_reserve, self.processes.layout.code))

    def reserve_exactly(self, capacity: Reservation) -> None:
        """Slots of these sizes; snapshots that are in such already stay."""
        if self._unlock:
            self._unlock()
            self._unlock = None
        self.members.reserve(capacity)
        self.capacity = capacity
        self._unlock = page_locked(self.client.memory)

    def too_large(self, needed: SlotBytes, *, in_use: bool) -> str:
        """Why there is no room for a state that has grown, for which what is held would be given up.

        ``in_use``: what is held is being read, so its memory does not become free.
        """
        if self.capacity is None:
            return ""
        code, local_size = self.processes.layout.code, self.processes.place.local_size
        new, old = Reservation.of(needed.with_reserve, code).total_bytes, self.capacity.total_bytes
        more = (new if in_use else new - old) * local_size
        purpose = f"the state has outgrown its memory; snapshots of this node's {local_size} ranks"
        try:
            self._agreement.together("looking for memory", lambda: check_available(more, purpose))
        except (SnapshotMemoryUnavailable, RankFailed) as error:
            if not failed_with(error, SnapshotMemoryUnavailable):
                raise
            return str(error)
        return ""

    def take_over(self, layout: RankLayout, found: Sequence[Sequence[Found]]) -> Members:
        """The memory of a former layout, of which each rank has found what is on its node."""
        place, clients = self.processes.place, dict[Member, SnapshotClient]()
        self._agreement.together(
            "taking over a former layout's memory",
            lambda: clients.update(taken_over(layout, found, place.rank, place.node, self.processes.connected)),
        )
        self.former = Members(self._agreement, clients, layout.code, self._limits)
        return self.former

    def end_former(self) -> None:
        """All ranks have a snapshot of this layout. For one rank alone."""
        if self.former is not None:
            self.former.close()
            self.former = None
            self.processes.end(former_only=True)

    def close(self) -> None:
        """Let go of all memory; it stays with the memory processes. For one rank alone."""
        if self._unlock:
            self._unlock()
            self._unlock = None
        if self.former:
            self.former.close()
        self.members.close()
