"""Packing on two levels: equal segments are packed once each, then stand as one buffer in the problem of the rest.

MEMO's way (arXiv 2407.12117, section on memory planning): the buffers that live and die within one pass over one block
are packed by themselves, all equal passes share the answer, and each pass is a pseudo buffer among the buffers that
cross its borders. It is fast where a trace repeats itself, and higher than packing all at once: what lies in a
pseudo buffer cannot use the holes outside, nor can others use its.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from stowplan.core.errors import InvalidArgument
from stowplan.planner.packing.library import OnProgress
from stowplan.planner.packing.mip import MOST_PAIRS, height_of, num_pairs, solve_mip
from stowplan.planner.packing.problem import FREE, Integers, Problem, Solution
from stowplan.planner.packing.segments import Segments, find_segments, whole
from stowplan.planner.packing.solve import Solver, pack

__all__ = ["solve_bilevel"]

_INNER_SHARE = 0.5  # of the time limit, at most


def solve_bilevel(
    problem: Problem,
    segments: Segments | None = None,
    time_limit_seconds: float = 10.0,
    on_progress: OnProgress | None = None,
) -> Solution:
    """Offsets by two levels. ``segments`` are half-open ranges of time, in order, apart from each other.

    Without them they are found where sizes repeat; if none do, all buffers are one segment. Each level is a MIP that
    starts from a greedy answer and has to better it; where more than ``MOST_PAIRS`` pairs of buffers are alive
    together, ``pack``'s other solvers take its place, and ``Solution.solver`` says so. The bound is that of live bytes,
    whatever the MIPs prove about their own problems. ``on_progress`` follows the outer level. ``pack`` checks the
    answer.

    Raises InvalidArgument for segments that overlap or are empty.
    """
    began = time.monotonic()
    segments = find_segments(problem) or whole(problem) if segments is None else segments
    _check(segments)

    def tell(height_bytes: int, bound_bytes: int, seconds: float) -> object:
        return on_progress and on_progress(height_bytes, problem.bound_bytes, time.monotonic() - began)

    inner = list(_members(problem, segments))
    crosses = np.ones(len(problem), dtype=np.bool_)
    for members in inner:
        crosses[members] = False
    crossing = np.flatnonzero(crosses)
    alone = len(inner) == 1 and not len(crossing)  # nothing is left for the outer level
    share = 1.0 if alone else _INNER_SHARE
    answers, said = _solve_inner(problem, inner, began + share * time_limit_seconds)
    outer = _outer(problem, crossing, inner, [height for _, height in answers])
    left = max(0.0, began + time_limit_seconds - time.monotonic())
    found, how = _solve(outer, left, otherwise="auto", on_progress=tell if on_progress else None)
    offsets = np.empty(len(problem), dtype=np.int64)
    offsets[crossing] = found[: len(crossing)]
    for members, (places, _), start in zip(inner, answers, found[len(crossing) :].tolist(), strict=True):
        offsets[members] = start + places
    return Solution(
        offsets=offsets,
        height_bytes=height_of(problem, offsets),
        bound_bytes=problem.bound_bytes,
        solver=f"bilevel ({said}; outer: {how})",
        seconds=time.monotonic() - began,
    )


def _check(segments: Segments) -> None:
    for lower, upper in segments:
        if upper <= lower:
            raise InvalidArgument(f"segments=: [{lower}, {upper}) is empty; its end must be above its beginning.")
    for (first, upper), (lower, last) in pairwise(segments):
        if lower < upper:
            raise InvalidArgument(
                f"segments=: [{lower}, {last}) begins before [{first}, {upper}) has ended; give segments in order of "
                f"time that do not overlap."
            )


def _members(problem: Problem, segments: Segments) -> Iterator[Integers]:
    """For each segment that has any: the buffers that live within it alone and are not fixed, int64 [k]."""
    if not segments:
        return
    starts, ends = (np.array(edges, dtype=np.int64) for edges in zip(*segments, strict=True))
    segment = np.searchsorted(starts, problem.lower, side="right") - 1
    inside = (segment >= 0) & (problem.upper <= ends[segment])
    if problem.fixed is not None:
        inside &= problem.fixed == FREE
    within = np.flatnonzero(inside)
    within = within[np.argsort(segment[within], kind="stable")]
    _, borders = np.unique(segment[within], return_index=True)
    yield from np.split(within, borders[1:]) if len(within) else ()


def _solve_inner(problem: Problem, inner: list[Integers], deadline: float) -> tuple[list[tuple[Integers, int]], str]:
    """(for each segment: offsets within it, int64 [k], and its height; how that was done, in words)."""
    posed = [_apart(problem, members) for members in inner]
    keys = [key for _, _, key in posed]
    answers: dict[bytes, tuple[Integers, int]] = {}
    num_left = len(set(keys))
    ways: set[str] = set()
    for part, _, key in posed:
        if key not in answers:
            limit = max(0.0, deadline - time.monotonic()) / num_left
            found, way = _solve(part, limit, otherwise="greedy")
            ways.add(way)
            answers[key] = (found, height_of(part, found))
            num_left -= 1
    said = f"segments: {len(inner)}, different: {len(answers)}, by {' and '.join(sorted(ways)) or 'nothing'}"
    return [(answers[key][0][back], answers[key][1]) for _, back, key in posed], said


def _solve(
    problem: Problem, time_limit_seconds: float, otherwise: Solver, on_progress: OnProgress | None = None
) -> tuple[Integers, str]:
    """(offsets, what found them): a MIP from a greedy start, or the solver ``otherwise`` if that MIP is too large."""
    began = time.monotonic()
    start = pack(problem, solver="greedy", time_limit_seconds=time_limit_seconds, on_progress=on_progress)
    left = max(0.0, began + time_limit_seconds - time.monotonic())
    if start.height_bytes <= problem.bound_bytes:
        return start.offsets, "greedy"
    if num_pairs(problem) <= MOST_PAIRS:
        return solve_mip(problem, start.offsets, left), "MIP"
    if otherwise == "greedy":
        return start.offsets, otherwise
    return pack(problem, solver=otherwise, time_limit_seconds=left, on_progress=on_progress).offsets, otherwise


def _apart(problem: Problem, members: Integers) -> tuple[Problem, Integers, bytes]:
    """(the buffers of one segment as a problem, which of its buffers each member is, what equal segments share).

    Only the order of times matters to packing: times are their ranks, and buffers are in the order of these.
    """
    _, ranks = np.unique(np.concatenate([problem.lower[members], problem.upper[members]]), return_inverse=True)
    lower, upper, size = ranks[: len(members)], ranks[len(members) :], problem.size[members]
    order = np.lexsort((size, upper, lower))
    part = Problem(lower=lower[order], upper=upper[order], size=size[order], alignment=problem.alignment)
    return part, np.argsort(order), np.concatenate([part.lower, part.upper, part.size]).tobytes()


def _outer(problem: Problem, crossing: Integers, inner: list[Integers], heights: list[int]) -> Problem:
    """The buffers of no segment, and after them one pseudo buffer for each segment."""
    fixed = None
    if problem.fixed is not None:
        fixed = np.concatenate([problem.fixed[crossing], np.full(len(inner), FREE, dtype=np.int64)])
    begins = np.array([problem.lower[members].min() for members in inner], dtype=np.int64)
    ends = np.array([problem.upper[members].max() for members in inner], dtype=np.int64)
    return Problem(
        lower=np.concatenate([problem.lower[crossing], begins]),
        upper=np.concatenate([problem.upper[crossing], ends]),
        size=np.concatenate([problem.size[crossing], np.array(heights, dtype=np.int64)]),
        alignment=problem.alignment,
        fixed=fixed,
    )
