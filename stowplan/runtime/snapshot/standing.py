"""How the snapshots of all ranks stand, as they tell each other before each one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stowplan.runtime.snapshot.disk.tier import DiskTier
from stowplan.runtime.snapshot.memory.messages import RankStatus
from stowplan.runtime.snapshot.memory.slots import State
from stowplan.runtime.snapshot.reservation import SlotBytes

__all__ = ["DiskStanding", "MemoryStanding", "Standing", "most"]


@dataclass(frozen=True, slots=True)
class MemoryStanding:
    """Of a rank's slots.

    Attributes:
        pending: whether one is on its way to GLOBAL.
        newest, complete: number of the newest snapshot, and of the newest that is GLOBAL.
        current: whether one of this generation is GLOBAL.
        blocking_seconds, total_seconds: of the last one.
    """

    pending: bool = False
    newest: int = 0
    complete: int = 0
    current: bool = False
    blocking_seconds: float | None = None
    total_seconds: float | None = None

    @classmethod
    def of(cls, own: RankStatus | None, generation: int) -> MemoryStanding:
        """None: the rank has no memory."""
        if own is None:
            return cls()
        done = [slot for slot in own.slots if slot.state is State.GLOBAL]
        return cls(
            pending=any(State.FREE < slot.state < State.GLOBAL for slot in own.slots),
            newest=max((slot.sequence for slot in own.slots), default=0),
            complete=max((slot.sequence for slot in done), default=0),
            current=any(slot.generation == generation for slot in done),
            blocking_seconds=own.blocking_seconds,
            total_seconds=own.total_seconds,
        )


@dataclass(frozen=True, slots=True)
class DiskStanding:
    """Of a rank's copies on disk.

    Attributes:
        writing_step, failed_step: the one that is being written, and the newest that came to nothing.
        read: number of the snapshot whose memory is being read; 0: none.
        late: whether that takes longer than it may.
    """

    writing_step: int | None = None
    failed_step: int | None = None
    read: int = 0
    late: bool = False

    @classmethod
    def of(cls, disk: DiskTier | None, sequence: int, patience_seconds: float) -> DiskStanding:
        """``sequence`` was last offered."""
        if disk is None:
            return cls()
        status, seconds = disk.status, disk.reading_seconds
        reading = seconds is not None
        late = seconds is not None and seconds > patience_seconds
        return cls(status.writing, status.failed_step, sequence if reading else 0, late)


@dataclass(frozen=True, slots=True)
class Standing:
    """Of a rank. ``trouble`` with its memory process; ``reachable``: whether there is one."""

    needed: SlotBytes
    memory: MemoryStanding = MemoryStanding()
    disk: DiskStanding = DiskStanding()
    trouble: str = ""
    reachable: bool = True
    step_seconds: float | None = None


def most(seconds: Sequence[float | None]) -> float | None:
    """The longest of those that are known; None where none is."""
    return max((each for each in seconds if each is not None), default=None)
