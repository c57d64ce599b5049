"""Ranks' memory that one process of a job takes care of, in step with what the others take care of.

In training each rank has its own. After a change of the number of ranks or nodes, the ranks that are there now share
out the memory of those that were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TypeVar

from stowplan.core.errors import UnrecoverableSnapshot
from stowplan.runtime.snapshot.codes import Code
from stowplan.runtime.snapshot.exchange.limits import SnapshotLimits
from stowplan.runtime.snapshot.memory.client import SnapshotClient
from stowplan.runtime.snapshot.memory.slots import State
from stowplan.runtime.snapshot.place import Agreement
from stowplan.runtime.snapshot.reservation import Reservation
from stowplan.runtime.snapshot.state.contents import Piece

__all__ = ["Member", "Members"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Member:
    """Local rank ``rank`` of node ``node`` of a layout."""

    node: int
    rank: int


class Members:
    """The members of one layout. Every rank of the job makes one, and calls its methods at the same time.

    Args:
        agreement: of all ranks of the job that is running now.
        clients: of those members that this process takes care of; none is allowed.
        code: over the layout's nodes; None for one node alone.
        limits: of the exchange between nodes.
    """

    def __init__(
        self,
        agreement: Agreement,
        clients: Mapping[Member, SnapshotClient],
        code: Code | None,
        limits: SnapshotLimits,
    ) -> None:
        self.clients = dict(clients)
        self._agreement, self._code, self._limits = agreement, code, limits

    def reserve(self, reservation: Reservation) -> None:
        """Memory for two snapshots and their parity, the same for all members; what is there already is taken.

        Raises SnapshotMemoryUnavailable; RankFailed where that was on other ranks.
        """

        def reserve() -> None:
            for member, client in self.clients.items():
                wanted = reservation.member(self._code, member.node)
                client.reserve(wanted.data_bytes, wanted.parity_bytes, wanted.coding)

        self._agreement.together("reserving memory for snapshots", reserve)
        self.meet()

    def meet(self) -> None:
        """Tell all nodes of each group where the others are; needed after each start of a memory process."""
        if self._code is None:
            return

        def listen() -> list[tuple[Member, tuple[str, int]]]:
            return [(member, client.listen(self._limits)) for member, client in self.clients.items()]

        everybody = [
            each for words in self._agreement.together("preparing the exchange of snapshots", listen) for each in words
        ]

        def meet() -> None:
            for member, client in self.clients.items():
                client.meet({other.node: address for other, address in everybody if other.rank == member.rank})

        self._agreement.together("connecting the exchange of snapshots", meet)

    def recovered(self, newest_on_disk: str) -> tuple[int, int]:
        """Number and step of the newest snapshot that all members can have, which they have afterwards.

        Raises UnrecoverableSnapshot, on all ranks.
        """
        for attempt in count():
            words = self._agreement.together("recovering snapshots", partial(self._attempt, newest_on_disk, attempt))
            found = [each for own in words for each in own]
            lost = [each for each in found if isinstance(each, UnrecoverableSnapshot)]
            if lost:
                raise next((each for each in words[self._agreement.rank] if isinstance(each, Exception)), lost[0])
            have = [each for each in found if isinstance(each, frozenset)]  # of numbers and steps
            common = frozenset.intersection(*have)
            if not common and (self._code is None or not all(have)):
                stands = self._code.stands if self._code else "one node alone has no parity"
                raise UnrecoverableSnapshot(["some rank's bytes of each snapshot"], stands)
            target = max(common) if common else min(max(each) for each in have)
            self._agreement.together("going back to a common snapshot", partial(self._roll_back, target[0]))
            if common:
                return target
        raise AssertionError

    def read(self, sequence: int) -> list[Piece]:
        """The members' bytes that this process takes care of.

        Raises UnrecoverableSnapshot, on all ranks, where any is damaged.
        """
        pieces: list[Piece] = []

        def read_all() -> list[str]:
            found = self._each(lambda client: self._piece(client, sequence))
            pieces.extend(each for each in found if each is not None)
            return [
                f"node {member.node}'s rank {member.rank}'s bytes of snapshot {sequence}"
                for member, each in zip(self.clients, found, strict=True)
                if each is None
            ]

        bad = [name for words in self._agreement.together("reading snapshots", read_all) for name in words]
        if bad:
            raise UnrecoverableSnapshot(bad, "they were damaged since they were recovered")
        return pieces

    def close(self) -> None:
        """Let go of all memory; it stays with the memory processes."""
        for client in self.clients.values():
            client.close()

    @staticmethod
    def _piece(client: SnapshotClient, sequence: int) -> Piece | None:
        try:
            schema, payload = client.read(sequence)
        except UnrecoverableSnapshot:
            return None
        (state, *_) = schema.tensors  # copies of others' shares are behind it
        return Piece(schema.values, payload[state.offset : state.offset + state.num_bytes])

    def _attempt(self, newest_on_disk: str, attempt: int) -> list[frozenset[tuple[int, int]] | UnrecoverableSnapshot]:
        return self._each(lambda client: self._recover(client, newest_on_disk, attempt))

    def _roll_back(self, sequence: int) -> None:
        for client in self.clients.values():
            client.roll_back(sequence)

    def _recover(
        self, client: SnapshotClient, newest_on_disk: str, attempt: int
    ) -> frozenset[tuple[int, int]] | UnrecoverableSnapshot:
        """Number and step of snapshots that a member has whole; with a code the one that its group has now."""
        try:
            if self._code is None:
                slots = client.inspect()
                return frozenset((s.sequence, s.step) for s in slots if s.state >= State.LOCAL and not s.damaged_data)
            found = client.recover(range(self._code.n), newest_on_disk, attempt)
            return frozenset([(found.sequence, found.step)])
        except UnrecoverableSnapshot as error:
            return error

    def _each(self, work: Callable[[SnapshotClient], T]) -> list[T]:
        """``work`` for all clients at the same time, as members of a group wait for each other."""
        if not self.clients:
            return []
        with ThreadPoolExecutor(len(self.clients)) as pool:
            return list(pool.map(work, self.clients.values()))
