"""The buffers of a step in the making: who holds them, and the events at which they come and go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stowplan.core.allocations import Allocation, AllocationTrace, Kind, Mark

__all__ = ["NOTHING", "Clock"]

NOTHING = -1  # instead of a buffer: no bytes


@dataclass(slots=True)
class _Buffer:
    """A buffer in the making; it dies when nobody holds it."""

    size_bytes: int
    lower: int
    kind: Kind
    part: int
    holders: int = 1
    upper: int | None = None
    outside: bool = False


class Clock:
    """Buffers and parts of the step, in order of events."""

    def __init__(self) -> None:
        self.buffers: list[_Buffer] = []
        self.marks: list[Mark] = []
        self.now = 0

    def begin(self, name: str) -> None:
        """The next part of the step."""
        self.marks.append(Mark(self.now, name))

    def open(self, num_bytes: int, kind: Kind, *, outside: bool = False) -> int:
        """Allocate; no bytes are ``NOTHING``."""
        if not num_bytes:
            return NOTHING
        self.buffers.append(_Buffer(num_bytes, self.now, kind, len(self.marks) - 1, outside=outside))
        self.now += 1
        return len(self.buffers) - 1

    def hold(self, buffer: int) -> None:
        """One more holds it."""
        if buffer != NOTHING:
            self.buffers[buffer].holders += 1

    def drop(self, buffer: int) -> None:
        """One holder less; the last one frees it."""
        if buffer == NOTHING:
            return
        self.buffers[buffer].holders -= 1
        if not self.buffers[buffer].holders:
            self.buffers[buffer].upper = self.now
            self.now += 1

    def drop_all(self, buffers: Iterable[int]) -> None:
        for buffer in buffers:
            self.drop(buffer)

    def is_for(self, buffer: int, kind: Kind) -> None:
        """It has turned out what the buffer is for."""
        if buffer != NOTHING:
            self.buffers[buffer].kind = kind
            self.buffers[buffer].outside = False

    def trace(self) -> AllocationTrace:
        """All buffers; those that nobody has freed live to the end."""
        head = next(number for number, mark in enumerate(self.marks) if mark.name == "head")
        ends = [*(mark.event for mark in self.marks[1:]), self.now]
        for buffer in self.buffers:
            if buffer.outside and buffer.upper is None and buffer.part >= head:
                buffer.kind = Kind.GRADIENT
            elif buffer.outside and (buffer.upper is None or buffer.upper > ends[buffer.part]):
                buffer.kind = Kind.KEPT
        return AllocationTrace(
            allocations=tuple(
                Allocation(b.size_bytes, b.lower, self.now if b.upper is None else b.upper, b.kind, self._name(b.part))
                for b in self.buffers
            ),
            marks=tuple(self.marks),
            num_events=self.now,
        )

    def _name(self, part: int) -> str:
        return self.marks[part].name
