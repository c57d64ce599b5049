"""Addresses for a problem by whichever solver fits: checked, with a bound; "impossible" is said with a proof only."""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import numpy as np

from stowplan.core.errors import CompilationFailed, InfeasibleCapacity, InvalidArgument, PlanRejected
from stowplan.planner.packing.fallback import pack_in_python
from stowplan.planner.packing.library import Method, OnProgress, library, run
from stowplan.planner.packing.problem import FREE, Problem, Solution
from stowplan.planner.packing.segments import Segments
from stowplan.planner.packing.validate import Verdict, validate

__all__ = ["Solver", "pack"]

Solver = Literal["auto", "greedy", "exact", "python", "bilevel"]


def pack(
    problem: Problem,
    *,
    capacity_bytes: int | None = None,
    solver: Solver = "auto",
    segments: Segments | None = None,
    time_limit_seconds: float = 10.0,
    on_progress: OnProgress | None = None,
) -> Solution:
    """Addresses for ``problem``, the lowest that are found in time, or the first that are within ``capacity_bytes``.

    ``"auto"``: orders in one go, then exact search (small problems) and local search in turns until the bound is met.
    ``"greedy"``: the orders alone. ``"exact"``: the orders, then exact search alone, for up to 4000 buffers.
    ``"python"``: a few orders without compiled code, which ``auto`` and ``greedy`` fall back to, with a RuntimeWarning.

    ``"bilevel"``: MEMO's two levels of MIPs, with ``segments`` or those that are found (bilevel.py); a baseline.

    Ends are padded to the alignment, also against ``capacity_bytes``. A time limit is met within some 50 ms once there
    is a first packing, which takes O(n log n) whatever the limit (``"python"``: O(n^2)); the answer's check comes on
    top. A solution above the capacity: time ran out.

    Raises InfeasibleCapacity: proved, by the bytes that are alive together or by a search that came to its end.
    InvalidArgument: fixed offsets that overlap, too many buffers for ``"exact"``, a solver, a time limit or a capacity
    that is none. CompilationFailed: ``"exact"`` without a compiler.
    """
    _check(problem, capacity_bytes, solver, time_limit_seconds)
    method = _method(solver)
    if solver == "bilevel":
        from stowplan.planner.packing.bilevel import solve_bilevel

        solution = solve_bilevel(problem, segments, time_limit_seconds, on_progress)
    elif method is None:
        solution = pack_in_python(
            problem, max(problem.bound_bytes, capacity_bytes or 0), time_limit_seconds, on_progress
        )
    else:
        solution = run(problem, method, capacity_bytes, time_limit_seconds, on_progress)
    fault = validate(problem, solution.offsets, solution.height_bytes)
    if fault is not None or solution.height_bytes < solution.bound_bytes:
        said = fault.message if fault else f"{solution.height_bytes} bytes are below the bound {solution.bound_bytes}"
        raise PlanRejected(f"the packer ({solution.solver}) gave wrong addresses: {said}. Please report the problem.")
    if capacity_bytes is not None and solution.bound_bytes > capacity_bytes:
        plain = problem.bound_bytes > capacity_bytes
        proof = "so many are alive together, or fixed as high" if plain else "an exact search came to its end"
        raise InfeasibleCapacity(capacity_bytes, solution.bound_bytes, proof)
    return solution


def _check(problem: Problem, capacity_bytes: int | None, solver: str, time_limit_seconds: float) -> None:
    if solver not in get_args(Solver):
        raise InvalidArgument(f"solver={solver!r}: give one of {', '.join(get_args(Solver))}.")
    if not time_limit_seconds >= 0:
        raise InvalidArgument(f"time_limit_seconds={time_limit_seconds}: give a number of seconds, 0 or more.")
    whole = capacity_bytes is None or isinstance(capacity_bytes, int | np.integer)
    if not whole or not 0 <= (capacity_bytes or 0) < 2**62:
        raise InvalidArgument(f"capacity_bytes={capacity_bytes}: give a whole number of bytes from 0 on, below 2**62.")
    if problem.fixed is None:
        return
    given = np.flatnonzero(problem.fixed != FREE)
    fixed = Problem(
        problem.lower[given],
        problem.upper[given],
        problem.aligned_size[given],
        names=[problem.name_of(int(buffer)) for buffer in given],
    )
    fault = validate(fixed, problem.fixed[given])
    if fault is not None:
        assert fault.verdict is Verdict.OVERLAP
        raise InvalidArgument(f"fixed offsets that cannot be: {fault.message} (ends padded to the alignment).")


def _method(solver: Solver) -> Method | None:
    """Which compiled method; None: Python, or what calls others."""
    if solver in ("bilevel", "python"):
        return None
    try:
        library()
    except CompilationFailed as error:
        if solver == "exact":
            raise
        warnings.warn(
            f'packing with solver="python", which is slow and packs less tightly: {error}',
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return Method[solver.upper()]
