"""Temporary: greedy by size."""

import numpy as np

from stowplan.planner.packing.problem import Problem, Solution


def pack(problem: Problem, *, time_limit_seconds: float = 1.0) -> Solution:
    n = len(problem)
    a = problem.aligned_size
    offsets = np.full(n, -1, np.int64)
    if problem.fixed is not None:
        offsets = problem.fixed.copy()
    placed = list(np.flatnonzero(offsets >= 0))
    for i in np.lexsort((-(problem.upper - problem.lower), -a)):
        if offsets[i] >= 0:
            continue
        p = np.array(placed, np.int64)
        p = p[(problem.lower[p] < problem.upper[i]) & (problem.upper[p] > problem.lower[i])]
        p = p[np.argsort(offsets[p], kind="stable")]
        at = 0
        for o, e in zip(offsets[p].tolist(), (offsets[p] + a[p]).tolist()):
            if o - at >= a[i]:
                break
            at = max(at, e)
        offsets[i] = at
        placed.append(i)
    return Solution(offsets, int((offsets + a).max()) if n else 0, problem.bound_bytes, "standin")
