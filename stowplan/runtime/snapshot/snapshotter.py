"""A training's snapshots: taken into its nodes' memory while it goes on, and found again after a restart.

    with stowplan.Snapshotter(model=model, optimizer=optimizer, run="llama-7", interval=10) as snapshots:
        restored = snapshots.restore()
        for step in range(restored.step if restored else 0, num_steps):
            ...
            snapshots.save(step + 1)

Note: what all ranks agree on. Before each one all say how their last one stands. While any is on its way, all skip,
unless a rank has lost it, so that it cannot arrive. Where a group gave one up that others have, those discard it: the
one before, which all have, stays until the next is GLOBAL on all. A snapshot that some rank could not restore never
takes the place of one that all can. What fails on one rank ends the call on all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stowplan.core.errors import (
    InvalidArgument,
    RankFailed,
    SnapshotProcessUnavailable,
    SnapshotRefused,
    StowplanError,
)
from stowplan.runtime.snapshot.codes import Name, code_for
from stowplan.runtime.snapshot.disk.copies import good_copies, next_attempt
from stowplan.runtime.snapshot.disk.tier import DiskStatus, DiskTier
from stowplan.runtime.snapshot.exchange.authentication import JobToken
from stowplan.runtime.snapshot.exchange.limits import SnapshotLimits
from stowplan.runtime.snapshot.fail_points import arm, fail_at
from stowplan.runtime.snapshot.interval import Timetable
from stowplan.runtime.snapshot.job_memory import JobMemory
from stowplan.runtime.snapshot.job_processes import JobProcesses
from stowplan.runtime.snapshot.layouts import RankLayout
from stowplan.runtime.snapshot.memory.client import Writing
from stowplan.runtime.snapshot.memory.messages import Status
from stowplan.runtime.snapshot.memory.protocol import IDLE_SECONDS
from stowplan.runtime.snapshot.memory.schema import Schema
from stowplan.runtime.snapshot.memory.slots import State
from stowplan.runtime.snapshot.place import Agreement, failed_with, node_name, own_address, run_name
from stowplan.runtime.snapshot.reservation import SlotBytes
from stowplan.runtime.snapshot.restoring import restore_newest
from stowplan.runtime.snapshot.standing import DiskStanding, MemoryStanding, Standing, most
from stowplan.runtime.snapshot.state.contents import Piece
from stowplan.runtime.snapshot.state.replicas import written_elsewhere
from stowplan.runtime.snapshot.state.restore import Restored
from stowplan.runtime.snapshot.state.shares import agreed_division
from stowplan.runtime.snapshot.state.sizes import described, expected_bytes
from stowplan.runtime.snapshot.state.training_state import Flat, TrainingState, flatten

__all__ = ["Saved", "Snapshotter", "SnapshotterStatus"]


@dataclass(frozen=True, slots=True)
class Saved:
    """What ``save`` did: ``seconds`` training waited for it, ``num_bytes`` of this rank; why ``skipped``, if it was."""

    step: int
    seconds: float = 0.0
    num_bytes: int = 0
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotterStatus:
    """``memory`` is this node's memory process's word; None where it cannot be reached. ``disk``: None without one.

    ``interval``: steps from one snapshot to the next, as it is now; None: no more are taken, as nothing fails.
    """

    num_saved: int
    num_skipped: int
    interval: int | None
    last: Saved | None
    memory: Status | None
    disk: DiskStatus | None


class Snapshotter:
    """Snapshots of one rank's training, with all other ranks; each makes one after torch.distributed is set up.

    Args:
        model, optimizer, scheduler, scaler, data, extras: as of ``TrainingState``.
        run: names the job: the same in all restarts, another for each job. Default: STOWPLAN_RUN, torchrun's id.
        interval: ``save`` takes every so manyeth step only. Default: each that it is called with.
        mtbf_seconds: mean time between failures of the whole job; instead of an interval, which is then chosen by
            Young's rule from what snapshots cost and how long steps take, and never shorter than a snapshot takes.
        code, m: the erasure code over nodes ("mirror", "raim5", "rs") and how many nodes may be lost. Default: by m, 1.
        node: this node's name. Default: STOWPLAN_NODE, the host's name. Ranks of one name share a memory process.
        listen: this host's address for other nodes. Default: 127.0.0.1 where all are one host, else by the host's name.
        limits: of the network and the time that the exchange between nodes may take.
        directory: copies on disk, too, on a file system that all nodes share.
        disk_interval: steps from one copy to the next.
        disk_patience_seconds: for how long a copy may keep its snapshot in memory; it is given up then.
        idle_seconds: how long memory outlives the last process that is connected to it.

    Several nodes need a job token (STOWPLAN_JOB_TOKEN_FILE). Raises InvalidArgument, SnapshotRefused,
    SnapshotProcessUnavailable; RankFailed where that was on other ranks, here and in all methods.
    """

    def __init__(
        self,
        *,
        model: Any,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        data: Any = None,
        extras: Mapping[str, Any] | None = None,
        run: str | None = None,
        interval: int | None = None,
        mtbf_seconds: float | None = None,
        code: Name | None = None,
        m: int = 1,
        node: str | None = None,
        listen: str | None = None,
        limits: SnapshotLimits | None = None,
        directory: str | Path | None = None,
        disk_interval: int | None = None,
        disk_patience_seconds: float = 600.0,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        if disk_interval is not None and (type(disk_interval) is not int or disk_interval < 1):
            raise InvalidArgument(f"disk_interval={disk_interval!r}: give a whole number of steps, 1 or more.")
        self._timetable = Timetable(interval, mtbf_seconds)
        self._parts = {
            "model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "data": data,
            "extras": extras or {},
        }  # fmt: skip
        self._disk_interval, self._disk_patience_seconds = disk_interval or 1, disk_patience_seconds
        self._agreement = Agreement()
        self.place = place = self._agreement.place(node_name(node))
        code_of_job = code_for(place.num_nodes, m, code) if place.num_nodes > 1 else None
        layout = RankLayout.of(place.num_nodes, place.local_size, code_of_job)
        self._processes = JobProcesses("", place, layout, "", idle_seconds)
        starting = self._agreement.together("starting memory processes", lambda: self._started(run, listen))
        self.run, self.generation = self._processes.run, max(starting)
        self._processes.generation = self.generation
        self._memory = JobMemory(self._agreement, self._processes, limits or SnapshotLimits())
        self._directory = Path(directory) if directory else None
        self._disk: DiskTier | None = None
        self._on_disk = 0  # number of the snapshot that was last offered to the disk
        if self._directory:
            attempts = self._agreement.together("looking at copies on disk", self._next_attempt)
            self._disk = DiskTier(
                self._directory, world_size=place.world_size, attempt=max(attempts), run=self.run,
                patience_seconds=disk_patience_seconds,
            )  # fmt: skip
        self._sequence = 0  # the highest number that any snapshot had
        self._may_be_replicated = True  # until it is known that nothing is
        self._num_saved = self._num_skipped = 0
        self._last: Saved | None = None

    # ---- taking one ----
    def save(self, step: int) -> Saved:
        """Take a snapshot, if the interval says so and the one before is complete; all ranks call it after each step.

        The copy is over when it returns; checksums, coding and the disk go on beside training.

        Raises InvalidArgument: something that a snapshot cannot hold; SnapshotMemoryUnavailable, if it reserves memory.
        """
        self._timetable.pause(step)
        try:
            if not self._timetable.due(step):
                return Saved(step, skipped="not due")
            return self._saved(step)
        finally:
            self._timetable.resume(step)

    def _saved(self, step: int) -> Saved:
        begin = time.perf_counter()
        made: list[tuple[Flat, str, Schema]] = []
        state = TrainingState(**self._parts, step=step)
        division = None
        if self._may_be_replicated:
            division = agreed_division(self._agreement, state, self._memory.group)
        self._may_be_replicated = division is not None
        to_disk = self._disk is not None and step % self._disk_interval == 0
        elsewhere = written_elsewhere(self._agreement, state) if to_disk else None

        def prepare() -> Standing:
            flat = flatten(state, division, elsewhere=elsewhere)
            text, schema, needed = described(flat)
            made.append((flat, text, schema))
            return self._standing(needed)

        words = self._agreement.together(f"the snapshot of step {step}", prepare)
        try:
            reason = self._taken(step, words, *made[0])
        except (SnapshotProcessUnavailable, RankFailed) as error:
            if not failed_with(error, SnapshotProcessUnavailable):
                raise
            reason = f"a memory process was lost meanwhile: {error}"
        num_bytes = 0 if reason else words[self.place.rank].needed.data_bytes
        saved = Saved(step, time.perf_counter() - begin, num_bytes, reason)
        self._num_saved += not reason
        self._num_skipped += bool(reason)
        self._last = saved
        return saved

    def _taken(self, step: int, words: list[Standing], flat: Flat, text: str, schema: Schema) -> str:
        """Take it, if it can be; why it was not."""
        complete = min(word.memory.complete for word in words)
        if all(word.memory.current for word in words):
            self._memory.end_former()
        reason, kept = self._late(words, complete)
        if reason:
            return reason
        self._timetable.plan(
            step, most([word.memory.blocking_seconds for word in words]),
            most([word.memory.total_seconds for word in words]), most([word.step_seconds for word in words]),
        )  # fmt: skip
        if any(word.memory.newest > complete for word in words):
            self._memory.roll_back(complete)
        needed = SlotBytes.most(word.needed for word in words)
        if not self._memory.holds(needed):
            if reason := self._memory.too_large(needed, in_use=any(word.disk.read for word in words)):
                return reason
            self._memory.reserve(needed)
            kept = 0
        sequence = self._sequence = max(self._sequence, *(word.memory.newest for word in words)) + 1
        client = self._memory.client
        writing = client.begin(sequence, step, schema, shares=flat.shares, kept=kept)
        if not isinstance(writing, Writing):
            raise SnapshotRefused("order", f"snapshot {sequence} cannot begin, though all were complete: {writing}.")
        try:
            fail_at("copy.begin")
            flat.copy_into(writing.payload)
            fail_at("copy.end")
        except BaseException:
            with contextlib.suppress(StowplanError):
                client.abandon(sequence)
            raise
        client.commit(sequence)
        fail_at("commit.end")
        if self._disk and step % self._disk_interval == 0:
            self._offer(self._disk, sequence, Piece(text, writing.payload[: flat.schema["bytes"]]), words)
        return ""

    def _offer(self, disk: DiskTier, sequence: int, piece: Piece, words: list[Standing]) -> None:
        """A copy on disk, unless some rank is not done with the one before."""
        if all(word.disk.writing_step is None for word in words):
            self._on_disk = sequence
            disk.offer([piece])
            return
        disk.skip()
        for failed in (word.disk.failed_step for word in words):
            disk.give_up(-1 if failed is None else failed)  # that part of it will not come

    def _standing(self, needed: SlotBytes) -> Standing:
        trouble, own = "", None
        try:
            own = self._memory.own()
        except SnapshotProcessUnavailable as lost:
            try:
                own = self._memory.rejoined(lost)
            except (SnapshotProcessUnavailable, SnapshotRefused, OSError) as error:
                if isinstance(error, SnapshotRefused) and error.reason == "generation":
                    raise
                trouble = f"no memory process on node {self.place.node}: {error}"
                return Standing(needed, trouble=trouble, reachable=False)
            trouble = "a memory process was lost, and its memory is being checked"
        if not self._memory.connected:
            trouble = trouble or "the exchange between nodes is not connected"
        return Standing(
            needed,
            MemoryStanding.of(own, self.generation),
            DiskStanding.of(self._disk, self._on_disk, self._disk_patience_seconds),
            trouble,
            step_seconds=self._timetable.step_seconds,
        )

    def _late(self, words: list[Standing], complete: int) -> tuple[str, int]:
        """Why no snapshot can be taken now; else the number of one to be kept. The same on all ranks."""
        if troubles := [word.trouble for word in words if word.trouble]:
            if self._memory.capacity and all(word.reachable for word in words):
                try:
                    self._memory.meet()
                except StowplanError as error:
                    return f"{troubles[0]}; {error}", 0
            return troubles[0], 0
        lost = len({word.memory.newest for word in words}) > 1  # by some rank, so it is discarded, not waited for
        if any(word.memory.pending for word in words) and not lost:
            return "the snapshot before is not complete on all nodes", 0
        kept = max(word.disk.read for word in words)
        if any(word.disk.late for word in words) and self._disk:
            self._disk.overtake()
            kept = 0
        if kept > complete:
            return "the copy on disk is being written", 0
        return "", kept

    # ---- restoring ----
    def restore(self) -> Restored | None:
        """Put the newest snapshot that all ranks can have into the training; None where there is none, nor a copy.

        From memory, from other nodes' memory by the code, or else from disk. All ranks call it before the first step.
        Memory for snapshots is reserved now.

        Raises UnrecoverableSnapshot: too much is lost, and there is no copy on disk; SnapshotMismatch, InvalidSnapshot:
        it is not of this training; SnapshotMemoryUnavailable.
        """
        restored = restore_newest(
            self._agreement, self._memory, lambda: TrainingState(**self._parts), self._directory
        )  # fmt: skip
        group = self._memory.group
        needed = SlotBytes.most(
            self._agreement.together("preparing snapshots", lambda: expected_bytes(TrainingState(**self._parts), group))
        )
        if not self._memory.holds(needed):
            self._memory.reserve(needed)
        return restored

    # ---- looking after them ----
    def status(self) -> SnapshotterStatus:
        """How snapshots stand on this node."""
        try:
            memory = self._memory.client.status()
        except SnapshotProcessUnavailable:
            memory = None
        disk = self._disk.status if self._disk else None
        interval = self._timetable.interval
        return SnapshotterStatus(self._num_saved, self._num_skipped, interval, self._last, memory, disk)

    def wait(self, timeout_seconds: float = 120.0) -> bool:
        """Wait until the last snapshot of this rank is GLOBAL; whether it is. False, too, without a memory process."""
        try:
            own = self._memory.own()
            newest = max((slot.sequence for slot in own.slots), default=0) if own else 0
            return bool(newest) and self._memory.client.wait(newest, State.GLOBAL, timeout_seconds) is State.GLOBAL
        except SnapshotProcessUnavailable:
            return False

    def end(self) -> None:
        """The job is over: copies on disk are written to their end, then the memory of all nodes is given up.

        All ranks call it. Without it the memory processes end when nobody was connected for ``idle_seconds``.
        """
        if self._disk:
            self._disk.wait(self._disk_patience_seconds)
        self._agreement.gather(None)  # all have what they wanted
        self._processes.end()
        self.close()

    def close(self) -> None:
        """Let go of the memory, which stays with its process, and end what is written to disk."""
        if self._disk:
            self._disk.close()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- memory ----
    def _started(self, run: str | None, listen: str | None) -> int:
        place, processes = self.place, self._processes
        processes.run, processes.listen = run_name(run), listen or own_address(place.one_host)
        arm(place.node, place.rank)
        if processes.layout.code:
            JobToken.from_environment()  # before training, not when coding begins
        return processes.start()

    def _next_attempt(self) -> int:
        """Of copies on disk, so that those of this start are the newest. Refuses those of another run."""
        assert self._directory is not None
        good_copies(self._directory, self.run)
        return next_attempt(self._directory, self.generation)
