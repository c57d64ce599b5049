"""Where a trace repeats itself: the passes over equal blocks, found by the sizes that are allocated.

A segment is a half-open range of time. Two passes over equal blocks allocate the same sizes in the same order, so that
the sequence of sizes, in the order of allocation, has a *tandem repeat*: a stretch that is followed by its own copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from stowplan.planner.packing.problem import Integers, Problem

__all__ = ["Segments", "find_segments", "whole"]

Segments = tuple[tuple[int, int], ...]  # half-open ranges of time, in order, none begins before another has ended

_SHORTEST = 4  # allocations in a segment
_MOST_COMPARISONS = 300_000_000  # of sizes, for one repeat: a second or so
_MOST_REPEATS = 8
_LEAST_SHARE = 0.02  # of all allocations: shorter repeats are not looked for


@dataclass(frozen=True, slots=True)
class _Repeat:
    """Allocations ``first`` to ``last`` (not included) have equal sizes ``period`` apart."""

    first: int
    last: int
    period: int


def whole(problem: Problem) -> Segments:
    """One segment that has every buffer; none if there is no buffer."""
    return ((int(problem.lower.min()), int(problem.upper.max())),) if len(problem) else ()


def find_segments(problem: Problem) -> Segments:
    """Segments where sizes repeat, cut where fewest buffers cross; () if nothing repeats."""
    order = np.lexsort((problem.size, problem.upper, problem.lower))
    sizes = np.unique(problem.size[order], return_inverse=True)[1].astype(np.int32)
    least = max(2 * _SHORTEST, int(_LEAST_SHARE * len(order)))
    stretches = [(0, len(order))]
    found: list[tuple[int, int]] = []
    for _ in range(_MOST_REPEATS):
        if not stretches:
            break
        first, last = stretches.pop(int(np.argmax([last - first for first, last in stretches])))
        repeat = _longest_repeat(sizes[first:last], least)
        if repeat is None:
            continue
        repeat = _Repeat(first + repeat.first, first + repeat.last, repeat.period)
        found += _cut(problem, order, repeat)
        stretches += [(a, b) for a, b in ((first, repeat.first), (repeat.last, last)) if b - a >= least]
    return _in_turn(found)


def _longest_repeat(sizes: npt.NDArray[np.int32], least: int) -> _Repeat | None:
    """The repeat that has most of ``sizes``, of the shortest period; None if none has ``least``."""
    best: _Repeat | None = None
    covered = least - 1
    longest = min(len(sizes) // 2, _MOST_COMPARISONS // max(1, len(sizes)))
    for period in range(_SHORTEST, longest + 1):
        equal = sizes[:-period] == sizes[period:]
        if np.count_nonzero(equal) < max(period, covered + 1 - period):
            continue
        edges = np.flatnonzero(np.diff(equal, prepend=False, append=False))  # begins and ends of runs, in turn
        runs = edges[1::2] - edges[::2]
        run = int(np.argmax(runs))
        first, length = int(edges[2 * run]), int(runs[run])
        same = bool((sizes[first : first + period] == sizes[first]).all())
        if length >= period and length + period > covered and not same:
            best, covered = _Repeat(first, first + length + period, period), length + period
    return best


def _cut(problem: Problem, order: Integers, repeat: _Repeat) -> list[tuple[int, int]]:
    """The copies of a repeat as ranges of time; of all places to cut, that where the fewest buffers are alive."""
    begins = np.append(problem.lower[order], problem.upper.max())
    starts = np.arange(repeat.first, repeat.last)
    ended = np.searchsorted(np.sort(problem.upper), begins[starts], side="right")
    begun = np.searchsorted(problem.lower[order], begins[starts])
    num_alive = begun - ended
    costs = [float(num_alive[phase :: repeat.period].mean()) for phase in range(repeat.period)]
    phase = int(np.argmin(costs))
    times = begins[np.arange(repeat.first + phase, repeat.last + 1, repeat.period)].tolist()
    return [(first, last) for first, last in pairwise(times) if first < last]


def _in_turn(found: list[tuple[int, int]]) -> Segments:
    """``found`` in order of time, without those that begin before the one before has ended."""
    kept: list[tuple[int, int]] = []
    for segment in sorted(found):
        if not kept or kept[-1][1] <= segment[0]:
            kept.append(segment)
    return tuple(kept)
