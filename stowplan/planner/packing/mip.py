"""Packing as a mixed-integer program: one binary for each two buffers alive together, which of them lies below.

The program of MEMO (arXiv 2407.12117, section on memory planning). Imports pulp: import this module only to solve.
"""

from __future__ import annotations

import time

import numpy as np

from stowplan.planner.packing.library import scale
from stowplan.planner.packing.problem import FREE, Integers, Problem
from stowplan.planner.packing.validate import validate
from stowplan.planner.rows import Rows, Variable

__all__ = ["MOST_PAIRS", "height_of", "num_pairs", "solve_mip"]

MOST_PAIRS = 6_000  # alive together: with more of them HiGHS seldom finds anything that greedy has not
_MOST_UNITS = 10**5  # of a capacity: beyond, the tolerance of HiGHS is a unit
_LEAST_SECONDS = 0.05


def height_of(problem: Problem, offsets: Integers) -> int:
    """Where the highest buffer ends, padded to the alignment."""
    return int((offsets + problem.aligned_size).max(initial=0))


def num_pairs(problem: Problem) -> int:
    """How many pairs of buffers are alive together at some time."""
    begun = np.searchsorted(np.sort(problem.lower), problem.upper, side="left")  # lower < upper of this one
    ended = np.searchsorted(np.sort(problem.upper), problem.lower, side="right")  # upper <= lower of this one
    return int((begun - ended).sum() - len(problem)) // 2


def solve_mip(problem: Problem, incumbent: Integers, time_limit_seconds: float) -> Integers:
    """Offsets, int64 [n], that are no higher than ``incumbent``, valid offsets of the same problem.

    HiGHS is asked for something lower within ``time_limit_seconds``, building the program included. Its offsets are
    not believed: they only say in which order buffers are put where they fit, which is at least as low as they were.
    Raises SolverFailed where there is no HiGHS.
    """
    height = height_of(problem, incumbent)
    if height <= problem.bound_bytes or num_pairs(problem) > MOST_PAIRS:
        return incumbent
    deadline = time.monotonic() + time_limit_seconds
    rows = Rows()
    offsets = _pose(problem, height, rows, deadline)
    left = deadline - time.monotonic()
    if left < _LEAST_SECONDS:
        return incumbent
    rows.solve("HiGHS", left, gap=0.0)
    values = [offset.value() for offset in offsets]
    if None in values or not np.isfinite(values).all():
        return incumbent
    found = _first_fit(problem, np.argsort(values, kind="stable").tolist())
    better = height_of(problem, found) < height and validate(problem, found) is None
    return found if better else incumbent


def _pose(problem: Problem, capacity_bytes: int, rows: Rows, deadline: float) -> list[Variable]:
    """Ask ``rows`` for the least height up to ``capacity_bytes``; the variables of offsets. Ends at ``deadline``.

    The unit is the greatest common divisor of all sizes, or more where numbers would outgrow the solver's tolerance.
    """
    unit = max(float(scale(problem)), capacity_bytes / _MOST_UNITS)
    fixed = [FREE] * len(problem) if problem.fixed is None else problem.fixed.tolist()
    capacity, sizes = capacity_bytes / unit, (problem.aligned_size / unit).tolist()
    height = rows.variable(problem.bound_bytes / unit, capacity)
    rows.minimise([(height, 1.0)])
    offsets = []
    for size, place in zip(sizes, fixed, strict=True):
        least, most = (0.0, capacity - size) if place == FREE else (place / unit, place / unit)
        offsets.append(rows.variable(least, most))
        rows.at_least([(height, 1.0), (offsets[-1], -1.0)], size)
    for buffer in range(len(problem)):
        together = (problem.lower[:buffer] < problem.upper[buffer]) & (problem.upper[:buffer] > problem.lower[buffer])
        for other in np.flatnonzero(together).tolist():
            below = rows.variable(0.0, 1.0, integer=True)
            gap = [(offsets[other], 1.0), (offsets[buffer], -1.0), (below, -capacity)]
            rows.at_least(gap, sizes[buffer] - capacity)
            rows.at_most(gap, -sizes[other])
        if time.monotonic() > deadline:
            break
    return offsets


def _first_fit(problem: Problem, order: list[int]) -> Integers:
    """Buffers in ``order``, each at the lowest offset that is free for its whole lifetime; fixed ones come first."""
    offsets = np.full(len(problem), FREE, dtype=np.int64) if problem.fixed is None else problem.fixed.copy()
    for buffer in order:
        if offsets[buffer] != FREE:
            continue
        together = (problem.lower < problem.upper[buffer]) & (problem.upper > problem.lower[buffer])
        place = 0
        taken = np.flatnonzero(together & (offsets != FREE))
        for other in taken[np.argsort(offsets[taken], kind="stable")].tolist():
            if offsets[other] - place >= problem.aligned_size[buffer]:
                break
            place = max(place, int(offsets[other] + problem.aligned_size[other]))
        offsets[buffer] = place
    return offsets
