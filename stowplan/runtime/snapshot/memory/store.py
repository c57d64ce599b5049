"""All that a node's memory process holds: the memory of each local rank, and what is computed on it in the background.

Methods may be called from any thread. What takes as long as reading a snapshot runs in worker threads without the lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from stowplan.core.errors import SnapshotRefused
from stowplan.core.units import format_bytes
from stowplan.runtime.snapshot.codes import crc32c
from stowplan.runtime.snapshot.fail_points import fail_at
from stowplan.runtime.snapshot.memory.coder import Alone, Coder
from stowplan.runtime.snapshot.memory.layout import Coding, Geometry, chunk_crcs, damage
from stowplan.runtime.snapshot.memory.messages import Begun, Skipped, SlotStatus
from stowplan.runtime.snapshot.memory.rank_memory import Checksums, RankMemory
from stowplan.runtime.snapshot.memory.region import Region
from stowplan.runtime.snapshot.memory.slots import Slots, Snapshot, State, every

__all__ = ["Store"]

_LOG = logging.getLogger(__name__)


class Store:
    """The memory of ``num_ranks`` local ranks of one run on one node; ``coder`` is told of what is LOCAL."""

    def __init__(self, run: str, generation: int, num_ranks: int, coder: Coder | None = None, num_threads: int = 2):
        self.run, self.num_ranks = run, num_ranks
        self._generation = generation
        self._coder = coder or Alone()
        self._ranks: dict[int, RankMemory] = {}
        self._completing: set[tuple[int, Snapshot]] = set()
        self._unverified: set[int] = set()
        self._failed: dict[int, str] = {}
        self._reserving = threading.Lock()
        self._changed = threading.Condition(threading.RLock())
        self._checkers = ThreadPoolExecutor(num_threads, "checksums")
        # Of each rank its own, as a coder may wait for checksums, and for the same rank's on other nodes.
        self._coders = [ThreadPoolExecutor(1, f"coder-{rank}") for rank in range(num_ranks)]
        self._to_be_coded: set[tuple[int, Snapshot]] = set()  # not begun yet

    # ---- memory ----
    def reserve(self, rank: int, geometry: Geometry, coding: Coding) -> RankMemory:
        """A rank's memory; what is there already is taken if it is alike, and replaced if nothing is in it.

        Raises SnapshotMemoryUnavailable, with what all ranks of this node would take; SnapshotRefused ("size").
        """
        self._check_rank(rank)
        with self._reserving:  # one after the other, as each takes what the others see as available
            with self._changed:
                memory = self._ranks.get(rank)
                if memory is not None and (memory.geometry, memory.coding) == (geometry, coding):
                    return memory
                if memory is not None and any(slot.state for slot in memory.slots.slots):
                    raise SnapshotRefused(
                        "size",
                        f"rank {rank} has memory for {memory.geometry} and {memory.coding} with snapshots in it, and "
                        f"{geometry} and {coding} are asked for: restore them and roll back to 0, or end the process.",
                    )
                if memory is not None:
                    del self._ranks[rank]
                    memory.region.close()
            what = (
                f"rank {rank}'s snapshots (2 slots of {format_bytes(geometry.data_capacity_bytes)} and of "
                f"{format_bytes(geometry.parity_capacity_bytes)} of parity; {self.num_ranks} ranks on this node)"
            )
            region = Region.create(f"stowplan-{self.run}-{rank}", geometry.total_bytes, what)
            _LOG.info("rank %d: reserved %s", rank, format_bytes(geometry.total_bytes))
            with self._changed:
                slots = Slots(generation=self._generation)
                self._ranks[rank] = RankMemory(self.run, rank, region, geometry, coding, slots)
                return self._ranks[rank]

    def adopt(self, rank: int, region: Region, geometry: Geometry, coding: Coding) -> RankMemory:
        """Take over memory that a former process gave; its bytes are checked in the background.

        Raises SnapshotRefused: "busy" where this process has memory of the rank already, and what ``RankMemory`` does.
        """
        self._check_rank(rank)
        with self._reserving, self._changed:
            if rank in self._ranks:
                raise SnapshotRefused("busy", f"rank {rank} has memory in this process already: attach it.")
            memory = RankMemory.adopted(self.run, rank, region, geometry, coding, self._generation)
            self._ranks[rank] = memory
            self._unverified.add(rank)
            self._raise(memory.slots.generation)
            _LOG.info("rank %d: adopted %s", rank, [slot.state.name for slot in memory.slots.slots])
        self._submit(self._checkers, rank, self._verify, memory)
        self.resume(rank)
        return memory

    def memory(self, rank: int) -> RankMemory:
        """Raises SnapshotRefused ("unknown")."""
        with self._changed:
            if rank not in self._ranks:
                raise SnapshotRefused("unknown", f"rank {rank} has no memory here: reserve it, or adopt what it has.")
            return self._ranks[rank]

    # ---- a snapshot's way ----
    def begin(
        self,
        rank: int,
        snapshot: Snapshot,
        data_bytes: int,
        schema_bytes: int,
        shares: tuple[int, ...] = (),
        kept: int = 0,
    ) -> Begun | Skipped:
        """A slot to write into, or what has to be done first. Raises SnapshotRefused, InvalidArgument (sizes).

        ``shares`` are as of ``Layout``; ``kept`` is the number of a snapshot that is not to be overwritten; 0: none.
        """
        with self._changed:
            memory = self.memory(rank)
            memory.slots.check(snapshot.generation)
            late = next((slot for slot in memory.slots.slots if slot.pending), None)
            if late is not None:
                return Skipped(late.sequence, late.state)
            return Begun(memory.begin(snapshot, data_bytes, schema_bytes, shares, kept=kept))

    def written(self, rank: int, sequence: int) -> None:
        """All bytes are there: checksums are computed in the background, then the slot is LOCAL."""
        with self._changed:
            memory = self.memory(rank)
            if memory.slots.state(sequence) is not State.WRITING:
                memory.slots.advanced(sequence, State.LOCAL)  # raises
            _, header = memory.header(sequence)
            if (rank, header.snapshot) in self._completing:
                return
            self._completing.add((rank, header.snapshot))
            memory.times.written(sequence)
        if not self._submit(self._checkers, rank, self._complete, memory, header.snapshot):
            self._end_completing(rank, header.snapshot)

    def abandon(self, rank: int, sequence: int) -> None:
        """Give a snapshot up. Raises SnapshotRefused."""
        with self._changed:
            memory = self.memory(rank)
            memory.become(memory.slots.abandoned(sequence))
            self._changed.notify_all()

    def abandon_unwritten(self, rank: int) -> None:
        """The writer is gone: what it had not written to the end is given up."""
        with self._changed:
            memory = self._ranks.get(rank)
            for slot in memory.slots.slots if memory else ():
                if slot.state is State.WRITING and (rank, slot.snapshot) not in self._completing:
                    _LOG.warning("rank %d: gave up %s, as its writer is gone", rank, slot.snapshot)
                    self.abandon(rank, slot.sequence)

    def commit_parity(self, rank: int, snapshot: Snapshot, parity_bytes: int = 0) -> None:
        """So many bytes of parity are in place, and every member of the group was LOCAL when they were made."""
        memory = self._having(rank, snapshot)
        sums = Checksums(chunk_crcs(memory.parity(snapshot.sequence, parity_bytes)))
        with self._changed:
            self._having(rank, snapshot).make_parity(snapshot.sequence, parity_bytes, sums)
            self._changed.notify_all()

    def commit_global(self, rank: int, snapshot: Snapshot) -> None:
        """Every member of the group has come to PARITY."""
        with self._changed:
            self._having(rank, snapshot).make_global(snapshot.sequence)
            self._failed.pop(rank, None)
            self._changed.notify_all()

    def data(self, rank: int, snapshot: Snapshot) -> memoryview:
        """A snapshot's bytes, schema first; check afterwards with ``holds`` that they still were what they were."""
        with self._changed:
            return self._having(rank, snapshot).data(snapshot.sequence)

    def parity(self, rank: int, snapshot: Snapshot, num_bytes: int) -> memoryview:
        """Where a snapshot's parity is, or is to be put."""
        with self._changed:
            return self._having(rank, snapshot).parity(snapshot.sequence, num_bytes)

    def holds(self, rank: int, snapshot: Snapshot, state: State = State.LOCAL) -> bool:
        """Whether a rank has come to ``state`` with this very snapshot."""
        with self._changed:
            slots = self.memory(rank).slots.slots
            return any(slot.snapshot == snapshot and slot.state >= state for slot in slots)

    def wait(self, rank: int, sequence: int, state: State, timeout_seconds: float) -> State:
        """The snapshot's state when it has come to ``state`` or beyond, is given up, or the time is over."""
        until = time.monotonic() + timeout_seconds
        with self._changed:
            while State.FREE < (now := self.memory(rank).slots.state(sequence)) < state:
                if not self._changed.wait(until - time.monotonic()):
                    return self.memory(rank).slots.state(sequence)
            return now

    # ---- restarts ----
    @property
    def generation(self) -> int:
        """The newest that was heard of."""
        return self._generation

    def check(self, generation: int) -> None:
        """Refuse a stale generation."""
        Slots(generation=self._generation).check(generation)

    def raise_generation(self, generation: int) -> None:
        """Older ones are refused from now on. Raises SnapshotRefused for one that is itself older."""
        with self._changed:
            self.check(generation)
            if generation > self._generation:
                _LOG.info("generation %d", generation)
            self._raise(generation)
            self._changed.notify_all()

    def roll_back(self, sequence: int) -> None:
        """Give up what is newer, on all ranks; what is restored and not yet GLOBAL is brought on its way again."""
        with self._changed:
            for memory in self._ranks.values():
                memory.become(memory.slots.rolled_back(sequence))
            self._changed.notify_all()
        for rank in self.members():
            self.resume(rank)

    # ---- what there is ----
    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nothing changes but by this thread; who waits looks again afterwards."""
        with self._changed:
            try:
                yield
            finally:
                self._changed.notify_all()

    def members(self) -> dict[int, Slots]:
        """The states of all ranks that have memory."""
        with self._changed:
            return {rank: memory.slots for rank, memory in sorted(self._ranks.items())}

    def inspect(self, rank: int) -> tuple[SlotStatus, ...]:
        """Look at all bytes of a rank now."""
        memory = self.memory(rank)
        self._verify(memory)
        with self._changed:
            return tuple(memory.slot_status(index) for index in range(len(memory.slots.slots)))

    def global_sequence(self) -> int:
        """The newest snapshot that is GLOBAL on all ranks; 0 where there is none."""
        members = list(self.members().values())
        if len(members) < self.num_ranks:
            return 0
        found = [slot.snapshot for slot in members[0].slots if slot.snapshot and slot.state is State.GLOBAL]
        return max((each.sequence for each in found if every(members, each, State.GLOBAL)), default=0)

    def reduced(self) -> tuple[str, ...]:
        """What is missing of redundancy; empty when all is as it should be."""
        with self._changed:
            problems = [f"rank {rank} has no memory here" for rank in range(self.num_ranks) if rank not in self._ranks]
            problems += [f"rank {rank}'s adopted memory is being checked" for rank in sorted(self._unverified)]
            problems += [f"rank {rank}: {problem}" for rank, problem in sorted(self._failed.items())]
            for rank, memory in sorted(self._ranks.items()):
                for index in sorted(index for index, found in memory.damaged.items() if found):
                    problems.append(f"rank {rank}: {memory.slots.slots[index].snapshot} is damaged")
            if not problems and not self.global_sequence():
                problems.append("no snapshot is GLOBAL on all ranks")
            return tuple(problems)

    def close(self) -> None:
        """Wait for what is being computed, and give the memory up."""
        self._checkers.shutdown(cancel_futures=True)
        for coders in self._coders:
            coders.shutdown(cancel_futures=True)
        with self._changed:
            for memory in self._ranks.values():
                memory.region.close()
            self._ranks.clear()

    # ---- in worker threads ----
    def _complete(self, memory: RankMemory, snapshot: Snapshot) -> None:
        try:
            with self._changed:
                data = self._having(memory.rank, snapshot, State.WRITING).data(snapshot.sequence)
                _, header = memory.header(snapshot.sequence)
            fail_at("checksums")
            sums = Checksums(chunk_crcs(data), crc32c(data[: header.schema_bytes]))
            with self._changed:
                self._having(memory.rank, snapshot, State.WRITING).make_local(snapshot.sequence, sums)
        finally:
            self._end_completing(memory.rank, snapshot)
        self._bring_on_its_way(memory.rank, snapshot)

    def _end_completing(self, rank: int, snapshot: Snapshot) -> None:
        """No checksums are computed any more; without them it is given up, as it would be in nobody's hands."""
        with self._changed:
            self._completing.discard((rank, snapshot))
            if self.holds(rank, snapshot, State.WRITING) and not self.holds(rank, snapshot, State.LOCAL):
                _LOG.error("rank %d: gave up %s, as its checksums cannot be computed", rank, snapshot)
                self.abandon(rank, snapshot.sequence)
            self._changed.notify_all()

    def _verify(self, memory: RankMemory) -> None:
        for index in range(len(memory.slots.slots)):
            with self._changed:
                header = memory.headers.get(index)
                if header is None or header.state < State.LOCAL:
                    continue
                if memory.mend_header(index):
                    _LOG.error("rank %d: the header of %s was damaged: mended", memory.rank, header.snapshot)
            found = damage(memory.region.view, index, header)
            with self._changed:
                if index in memory.headers and memory.headers[index].snapshot == header.snapshot:
                    memory.damaged[index] = found
        with self._changed:
            if self._ranks.get(memory.rank) is memory:
                self._unverified.discard(memory.rank)
            self._changed.notify_all()

    def resume(self, rank: int) -> None:
        """Tell the coder of what of this rank is on its way, as nobody else will."""
        for slot in self.members()[rank].slots:
            if slot.snapshot and State.LOCAL <= slot.state < State.GLOBAL:
                self._bring_on_its_way(rank, slot.snapshot)

    def _bring_on_its_way(self, rank: int, snapshot: Snapshot) -> None:
        """Once more where it is being coded already, as what held that up may be gone; not where it waits for that."""
        with self._changed:
            if (rank, snapshot) in self._to_be_coded:
                return
            self._to_be_coded.add((rank, snapshot))
        if not self._submit(self._coders[rank], rank, self._code, rank, snapshot):
            self._to_be_coded.discard((rank, snapshot))

    def _code(self, rank: int, snapshot: Snapshot) -> None:
        with self._changed:
            self._to_be_coded.discard((rank, snapshot))
        self._coder.code(self, rank, snapshot)

    def _submit(self, pool: ThreadPoolExecutor, rank: int, job: Callable[..., None], *arguments: object) -> bool:
        """Run it in the background, if it can be; ``reduced`` tells what is wrong until a snapshot is GLOBAL again."""

        def ended(future: Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            if isinstance(error, SnapshotRefused):  # given up meanwhile
                _LOG.info("rank %d: %s", rank, error)
            elif error is not None:
                self._fail(rank, error)

        try:
            pool.submit(job, *arguments).add_done_callback(ended)
        except RuntimeError as error:  # no more threads
            self._fail(rank, error)
            return False
        return True

    def _fail(self, rank: int, error: BaseException) -> None:
        _LOG.error("rank %d: a snapshot goes no further", rank, exc_info=error)
        with self._changed:
            self._failed[rank] = f"{type(error).__name__}: {error}"

    def _having(self, rank: int, snapshot: Snapshot, least: State = State.LOCAL) -> RankMemory:
        memory = self.memory(rank)
        if not self.holds(rank, snapshot, least):
            raise SnapshotRefused("order", f"rank {rank} does not have {snapshot} any more.")
        return memory

    def _raise(self, generation: int) -> None:
        self._generation = max(generation, self._generation)
        for memory in self._ranks.values():
            memory.become(memory.slots.fenced(self._generation))

    def _check_rank(self, rank: int) -> None:
        if rank >= self.num_ranks:
            raise SnapshotRefused("unknown", f"rank {rank}: this node's memory process serves {self.num_ranks} ranks.")
