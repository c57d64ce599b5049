"""The coder of one node of several: an exchange for each local rank's group, all in one event loop and thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from stowplan.core.errors import InvalidArgument, SnapshotPeerUnavailable, SnapshotRefused
from stowplan.runtime.snapshot.codes import NAMES, code_for
from stowplan.runtime.snapshot.exchange.authentication import JobToken
from stowplan.runtime.snapshot.exchange.exchange import Exchange, Verdict, member_of
from stowplan.runtime.snapshot.exchange.limits import SnapshotLimits
from stowplan.runtime.snapshot.exchange.peers import Address
from stowplan.runtime.snapshot.exchange.rank_store import RankStore
from stowplan.runtime.snapshot.exchange.recovery import Restored, recover
from stowplan.runtime.snapshot.memory.coder import Alone
from stowplan.runtime.snapshot.memory.layout import CHUNK_BYTES, Coding
from stowplan.runtime.snapshot.memory.slots import Snapshot, State
from stowplan.runtime.snapshot.memory.store import Store

__all__ = ["GroupCoder"]

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class GroupCoder:
    """``Coder`` of ranks whose memory was reserved with a code; without one it is ``Alone``.

    ``host`` is where exchanges listen. Methods may be called from any thread but the loop's.
    """

    def __init__(self, run: str, host: str) -> None:
        self._run, self._host = run, host
        self._lock = threading.Lock()
        self._exchanges: dict[int, tuple[tuple[Coding, SnapshotLimits], Exchange, Address]] = {}
        self._met: set[int] = set()  # ranks whose peers' addresses are known
        self._loop: asyncio.AbstractEventLoop | None = None
        self._alone = Alone()

    def listen(self, store: Store, rank: int, limits: SnapshotLimits) -> Address:
        """Where the rank's exchange listens; it is started if it is not there yet, and anew for other limits.

        Raises SnapshotRefused: "order" for memory without a code, "token", "address" for one that is not this host's.
        """
        coding = store.memory(rank).coding
        with self._lock:
            known = self._exchanges.get(rank)
            if known and known[0] == (coding, limits):
                return known[2]
            if coding.code not in NAMES:
                raise SnapshotRefused("order", f"rank {rank}'s memory has no code, so nobody to exchange with.")
            code = code_for(coding.n, coding.m, coding.code)
            member = member_of(self._run, f"rank-{rank}", coding.index, code, CHUNK_BYTES)
            try:
                token = JobToken.from_environment()
            except InvalidArgument as error:
                raise SnapshotRefused("token", str(error)) from error
            if known:
                self._wait_for(known[1].close())
                self._met.discard(rank)

            async def started() -> tuple[Exchange, Address]:
                exchange = Exchange(member, code, RankStore(store, rank), token, limits)
                return exchange, await exchange.start(self._host)

            try:
                exchange, address = self._wait_for(started())
            except OSError as error:
                raise SnapshotRefused("address", f"nothing can listen at {self._host}: {error}.") from error
            self._exchanges[rank] = (coding, limits), exchange, address
            return address

    def meet(self, store: Store, rank: int, addresses: Mapping[int, Address]) -> None:
        """Where the other nodes of the rank's group listen; what is on its way to GLOBAL goes on."""
        exchange = self._exchange(rank)

        async def connect() -> None:
            exchange.connect(addresses)

        self._wait_for(connect())
        with self._lock:
            self._met.add(rank)
        store.resume(rank)

    def recover(self, rank: int, alive: Sequence[int], newest_on_disk: str, attempt: int) -> Restored:
        """As ``recovery.recover``, for the rank's group."""
        return self._wait_for(recover(self._exchange(rank), alive, newest_on_disk, attempt=attempt))

    def code(self, store: Store, rank: int, snapshot: Snapshot) -> None:
        """Until it is GLOBAL or given up; nothing before the peers are known, as ``meet`` comes back to it.

        Raises SnapshotPeerUnavailable, with the reason, for what is given up.
        """
        if store.memory(rank).coding.n == 1:
            self._alone.code(store, rank, snapshot)
            return
        with self._lock:
            if rank not in self._met:
                return
        while store.holds(rank, snapshot) and not store.holds(rank, snapshot, State.GLOBAL):
            outcome = self._wait_for(self._exchange(rank).code(snapshot))
            _LOG.info("rank %d: %s is %s %s", rank, snapshot, outcome.verdict, outcome.reason)
            if outcome.verdict is Verdict.FENCED:
                return
            if outcome.verdict is Verdict.SKIPPED:
                raise SnapshotPeerUnavailable(f"{snapshot} was given up: {outcome.reason}")

    def _exchange(self, rank: int) -> Exchange:
        with self._lock:
            if rank not in self._exchanges:
                raise SnapshotRefused("order", f"rank {rank} does not listen yet: Listen comes first.")
            return self._exchanges[rank][1]

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True, name="exchange").start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
