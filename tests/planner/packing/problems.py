"""Problems for the tests of packing, and a plain search for the least height that shares nothing with the solvers."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from stowplan.planner.packing import FREE, Problem

DSA = Path(__file__).parents[2] / "data" / "dsa"
DSA_NAMES, DSA_CAPACITY = "ABCDEF", 1048576


def dsa(name: str) -> Problem:
    with (DSA / f"{name}.{DSA_CAPACITY}.csv").open() as file:
        rows = list(csv.DictReader(file))
    return Problem(*(np.array([int(row[key]) for row in rows]) for key in ("lower", "upper", "size")))


def churn(count: int, seed: int = 0) -> Problem:
    """Random lifetimes, about 50 alive at a time, and sizes over three decades."""
    random = np.random.default_rng(seed)
    lower = random.integers(0, 4 * count, count)
    return Problem(lower, lower + random.integers(1, 400, count), 2 ** random.integers(6, 16, count))


@st.composite
def problems(draw: st.DrawFn, most: int = 40, largest: int = 50) -> Problem:
    count = draw(st.integers(0, most))
    numbers = lambda low, high: np.array(  # noqa: E731
        draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), dtype=np.int64
    )
    lower = numbers(-5, 20)
    return Problem(
        lower, lower + numbers(1, 12), numbers(1, largest), alignment=draw(st.sampled_from((1, 1, 3, 8))),
    )  # fmt: skip


def with_fixed(problem: Problem, offsets: np.ndarray, which: np.ndarray) -> Problem:
    """``problem`` with the offsets of ``which`` given."""
    fixed = np.where(which, offsets, FREE)
    return Problem(problem.lower, problem.upper, problem.size, alignment=problem.alignment, fixed=fixed)


def first_fit(problem: Problem, order: list[int], offsets: list[int]) -> list[int]:
    """Each buffer of ``order`` at its least offset among those that have one: ``offsets`` is FREE for the others."""
    lower, upper, size = problem.lower.tolist(), problem.upper.tolist(), problem.aligned_size.tolist()
    offsets = list(offsets)
    for i in order:
        at = 0
        others = [j for j in range(len(problem)) if offsets[j] != FREE and lower[i] < upper[j] and lower[j] < upper[i]]
        for j in sorted(others, key=lambda j: offsets[j]):
            if offsets[j] - at >= size[i]:
                break
            at = max(at, offsets[j] + size[j])
        offsets[i] = at
    return offsets


def height(problem: Problem, offsets: list[int]) -> int:
    return max((at + bytes_ for at, bytes_ in zip(offsets, problem.aligned_size.tolist(), strict=True)), default=0)


def least_height(problem: Problem) -> int:
    """By trying every order: some order puts the buffers of a lowest packing, pushed down, where they are."""
    size = problem.aligned_size.tolist()
    given = [FREE] * len(problem) if problem.fixed is None else problem.fixed.tolist()
    best = height(problem, first_fit(problem, [i for i, at in enumerate(given) if at == FREE], given))

    def descend(offsets: list[int], top: int) -> None:
        nonlocal best
        free = [i for i, at in enumerate(offsets) if at == FREE]
        if top < best and not free:
            best = top
        for i in free:
            if top >= best:
                return
            placed = first_fit(problem, [i], offsets)
            descend(placed, max(top, placed[i] + size[i]))

    descend(given, max((at + size[i] for i, at in enumerate(given) if at != FREE), default=0))
    return best
