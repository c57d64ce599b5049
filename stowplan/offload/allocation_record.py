"""What a memory log was told, line by line, and what follows from it: live bytes by segment, buffers with identity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from stowplan.core.allocations import Events

__all__ = ["AllocationRecord", "Happening", "Segment", "What", "segments_of"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Live bytes between two marks, above what was alive when the log began."""

    name: str
    start_bytes: int
    peak_bytes: int
    end_bytes: int


class What(Enum):
    """What a log can be told."""

    ALLOCATED = "allocated"
    FREED = "freed"
    MARK = "mark"
    NOTE = "note"  # the buffer at an address has a name


class Happening(NamedTuple):
    """One line of a log. ``address`` tells buffers apart that are alive together; 0 where it is not known."""

    what: What
    address: int = 0
    num_bytes: int = 0
    name: str = ""


def segments_of(happenings: Iterable[Happening]) -> list[Segment]:
    """Live bytes between marks. Frees of what was there before the log count where the allocator tells them."""
    segments: list[Segment] = []
    name, live, start, peak = "", 0, 0, 0
    for what, _, num_bytes, mark in happenings:
        if what is What.ALLOCATED:
            live += num_bytes
            peak = max(peak, live)
        elif what is What.FREED:
            live -= num_bytes
        elif what is What.MARK:
            if name:
                segments.append(Segment(name, start, peak, live))
            name, start, peak = mark, live, live
    segments.append(Segment(name, start, peak, live))
    return segments


class AllocationRecord:
    """What happened, with numbered buffers for addresses.

    ``events`` are as the note in ``core.allocations`` says; frees of what was there before are not among them.
    ``marks`` has how many events came before each mark, ``notes`` the buffer that had each name.
    """

    def __init__(self, happenings: Iterable[Happening]) -> None:
        self.events: list[int] = []
        self.marks: dict[str, int] = {}
        self.notes: dict[str, int] = {}
        live: dict[int, int] = {}
        count = 0
        for what, address, num_bytes, name in happenings:
            if what is What.ALLOCATED and num_bytes:
                live[address] = count
                count += 1
                self.events.append(num_bytes)
            elif what is What.FREED and address in live:
                self.events.append(~live.pop(address))
            elif what is What.MARK:
                self.marks[name] = len(self.events)
            elif what is What.NOTE and address in live:
                self.notes[name] = live[address]

    def between(self, first: str, last: str) -> Events:
        """The events from one mark to another."""
        return tuple(self.events[self.marks[first] : self.marks[last]])

    def alive_at(self, mark: str) -> set[int]:
        """The buffers that are alive there."""
        live: set[int] = set()
        count = 0
        for event in self.events[: self.marks[mark]]:
            if event > 0:
                live.add(count)
                count += 1
            else:
                live.remove(~event)
        return live

    def noted(self, name: str) -> dict[int, int]:
        """The buffers that had the names ``"name 0"``, ``"name 1"``, …, by these numbers."""
        parts = ((*note.rpartition(" "), buffer) for note, buffer in self.notes.items())
        return {int(number): buffer for owner, _, number, buffer in parts if owner == name}
