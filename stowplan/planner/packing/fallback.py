"""Packing in Python, for machines without a compiler: the best of a few orders, slow beyond ten thousand buffers."""

from __future__ import annotations

import time

import numpy as np

from stowplan.planner.packing.library import OnProgress
from stowplan.planner.packing.problem import FREE, Integers, Problem, Solution

__all__ = ["pack_in_python"]


def pack_in_python(
    problem: Problem, enough_bytes: int, time_limit_seconds: float, on_progress: OnProgress | None = None
) -> Solution:
    """First fit by size, by area, by width and by crowding, until ``enough_bytes`` or the time is met.

    The first order is always tried; ``on_progress`` is called after each, and a true answer ends it. The bound is the
    problem's: nothing is proved by search.
    """
    began = time.perf_counter()
    best = _first_fit(problem, _by(problem.aligned_size))
    height = _height(problem, best)
    widths = problem.upper.astype(np.float64) - problem.lower
    for keys in (widths * problem.size, widths, problem.aligned_size * _crowding(problem).astype(np.float64) ** 8):
        seconds = time.perf_counter() - began
        stopped = on_progress is not None and on_progress(height, problem.bound_bytes, seconds)
        if stopped or height <= enough_bytes or seconds > time_limit_seconds:
            break
        offsets = _first_fit(problem, _by(keys))
        if _height(problem, offsets) < height:
            best, height = offsets, _height(problem, offsets)
    return Solution(best, height, problem.bound_bytes, "python", time.perf_counter() - began)


def _by(keys: np.ndarray) -> Integers:
    return np.argsort(-keys, kind="stable")


def _height(problem: Problem, offsets: Integers) -> int:
    return int((offsets + problem.aligned_size).max(initial=0))


def _crowding(problem: Problem) -> Integers:
    """The most bytes that are alive while each buffer is: where it begins, or where one that begins later does."""
    order = np.argsort(problem.lower, kind="stable")
    begins, ends = problem.lower[order], np.sort(problem.upper)
    grown = np.concatenate([[0], np.cumsum(problem.aligned_size[order])])
    gone = np.concatenate([[0], np.cumsum(problem.aligned_size[np.argsort(problem.upper, kind="stable")])])
    alive = grown[np.searchsorted(begins, begins, "right")] - gone[np.searchsorted(ends, begins, "right")]
    first = np.searchsorted(begins, problem.lower, "left")
    last = np.searchsorted(begins, problem.upper, "left")
    return np.array([alive[a:b].max() for a, b in zip(first, last, strict=True)], np.int64)


def _first_fit(problem: Problem, order: Integers) -> Integers:
    """Each buffer in ``order`` at the least offset that is free while it is alive; fixed ones are there before."""
    offsets = np.full(len(problem), FREE) if problem.fixed is None else problem.fixed.copy()
    is_free = offsets == FREE
    placed = np.concatenate([np.flatnonzero(~is_free), order[is_free[order]]])
    lower, upper, size = problem.lower[placed], problem.upper[placed], problem.aligned_size[placed]
    start = offsets[placed]
    end = start + size
    for k in range(int((~is_free).sum()), len(placed)):
        near = np.flatnonzero((lower[:k] < upper[k]) & (lower[k] < upper[:k]))
        near = near[np.argsort(start[near], kind="stable")]
        tops = np.maximum.accumulate(np.concatenate([[0], end[near]]))
        holes = np.flatnonzero(start[near] - tops[:-1] >= size[k])
        start[k] = tops[holes[0]] if len(holes) else tops[-1]
        end[k] = start[k] + size[k]
    offsets[placed] = start
    return offsets
