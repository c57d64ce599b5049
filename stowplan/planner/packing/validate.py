"""An independent check of addresses. It shares no code with any solver: a sweep over time, neighbours by address."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from stowplan.planner.packing.problem import FREE, Integers, Problem

__all__ = ["Verdict", "Violation", "validate"]


class Verdict(StrEnum):
    """What can be wrong with an address."""

    MISSING = "missing"  # offsets for another number of buffers
    NEGATIVE = "negative"
    MISALIGNED = "misaligned"
    MOVED = "moved"  # it was fixed elsewhere
    OUT_OF_CAPACITY = "out of capacity"
    OVERLAP = "overlap"


@dataclass(frozen=True, slots=True)
class Violation:
    """One fault: which, of which buffers (by number), and in words."""

    verdict: Verdict
    buffers: tuple[int, ...]
    message: str


def validate(problem: Problem, offsets: Integers, capacity_bytes: int | None = None) -> Violation | None:
    """The first fault of ``offsets`` (int64 [n]), or None: every address is good. Ends are not padded to alignment."""
    if len(offsets) != len(problem):
        return Violation(Verdict.MISSING, (), f"{len(offsets)} offsets for {len(problem)} buffers")
    starts, sizes = offsets.tolist(), problem.size.tolist()
    fixed = None if problem.fixed is None else problem.fixed.tolist()
    for buffer, start in enumerate(starts):
        name = f"buffer {problem.name_of(buffer)} at {start}"
        if start < 0:
            return Violation(Verdict.NEGATIVE, (buffer,), name)
        if start % problem.alignment:
            return Violation(Verdict.MISALIGNED, (buffer,), f"{name} is no multiple of {problem.alignment}")
        if fixed is not None and fixed[buffer] not in (FREE, start):
            return Violation(Verdict.MOVED, (buffer,), f"{name} was fixed at {fixed[buffer]}")
        if capacity_bytes is not None and start + sizes[buffer] > capacity_bytes:
            end = start + sizes[buffer]
            return Violation(Verdict.OUT_OF_CAPACITY, (buffer,), f"{name} ends at {end}, above {capacity_bytes}")
    return _first_overlap(problem, starts, sizes)


def _first_overlap(problem: Problem, starts: list[int], sizes: list[int]) -> Violation | None:
    count = len(problem)
    begins = np.arange(2 * count) >= count
    events = np.lexsort((begins, np.concatenate([problem.upper, problem.lower])))  # what ends at a time goes first
    alive: list[tuple[int, int]] = []  # (start, buffer), by start
    for event in events.tolist():
        buffer = event % count
        start, end = starts[buffer], starts[buffer] + sizes[buffer]
        place = bisect_left(alive, (start, buffer))
        if event < count:
            del alive[place]
            continue
        for neighbour in alive[max(place - 1, 0) : place + 1]:
            other_start, other = neighbour
            if start < other_start + sizes[other] and other_start < end:
                names = f"{problem.name_of(other)} and {problem.name_of(buffer)}"
                where = f"[{other_start}, {other_start + sizes[other]}) and [{start}, {end})"
                return Violation(Verdict.OVERLAP, (other, buffer), f"buffers {names} share bytes: {where}")
        insort(alive, (start, buffer))
    return None
