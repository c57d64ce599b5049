from __future__ import annotations

from itertools import permutations

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowplan.core.errors import SolverFailed
from stowplan.planner import rows
from stowplan.planner.packing import FREE, Problem, mip, validate
from stowplan.planner.packing.mip import height_of, num_pairs, solve_mip
from stowplan.planner.packing.problem import Integers
from tests.planner.packing.traces import churn

TABLE = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=5)


def problem_of(table: list[tuple[int, int, int]], alignment: int = 1, fixed: list[int] | None = None) -> Problem:
    lower, life, size = np.array(table, dtype=np.int64).T
    places = None if fixed is None else np.array(fixed)
    return Problem(lower=lower, upper=lower + life, size=size, alignment=alignment, fixed=places)


def stacked(problem: Problem) -> Integers:
    """Every buffer above the one before: valid for any lifetimes."""
    return np.cumsum(problem.aligned_size) - problem.aligned_size


def least_height(problem: Problem) -> int:
    """The height of the best packing: one of those that put buffers, in some order, as low as possible."""
    heights = []
    for order in permutations(range(len(problem))):
        offsets = np.full(len(problem), FREE)
        for buffer in order:
            others = [
                (int(offsets[other]), int(offsets[other] + problem.aligned_size[other]))
                for other in range(len(problem))
                if offsets[other] != FREE
                and problem.lower[other] < problem.upper[buffer]
                and problem.lower[buffer] < problem.upper[other]
            ]
            end = int(problem.aligned_size[buffer])
            places = sorted({0, *(last for _, last in others)})
            offsets[buffer] = next(
                place for place in places if all(last <= place or first >= place + end for first, last in others)
            )
        heights.append(height_of(problem, offsets))
    return min(heights)


@given(TABLE, st.sampled_from([1, 4]))
@settings(max_examples=40, deadline=None)
def test_small_problems_are_packed_as_low_as_can_be(table: list[tuple[int, int, int]], alignment: int) -> None:
    problem = problem_of(table, alignment)
    offsets = solve_mip(problem, stacked(problem), 20.0)
    assert validate(problem, offsets) is None
    assert height_of(problem, offsets) == least_height(problem)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.just(1)), min_size=1, max_size=30))
def test_pairs_that_are_alive_together_are_counted(table: list[tuple[int, int, int]]) -> None:
    problem = problem_of(table)
    lower, upper = problem.lower, problem.upper
    together = (lower[:, None] < upper) & (lower < upper[:, None])
    assert num_pairs(problem) == (together.sum() - len(problem)) // 2


def test_sizes_too_large_for_floats() -> None:
    problem = problem_of([(0, 2, 2**57 + 1), (1, 2, 2**56 + 3), (2, 2, 2**57 + 1)])
    offsets = solve_mip(problem, stacked(problem), 20.0)
    assert validate(problem, offsets) is None
    assert height_of(problem, offsets) == 2**57 + 2**56 + 4


def test_fixed_buffers_stay() -> None:
    problem = problem_of([(0, 4, 10), (0, 2, 5), (2, 2, 6)], fixed=[5, FREE, FREE])
    offsets = solve_mip(problem, np.array([5, 15, 20]), 20.0)
    assert offsets.tolist() == [5, 0, 15]


def test_what_cannot_be_bettered_is_given_back() -> None:
    best = problem_of([(0, 4, 10), (0, 2, 5), (2, 2, 5)])
    at_the_bound = np.array([0, 10, 10])
    assert solve_mip(best, at_the_bound, 20.0) is at_the_bound
    large = churn(40)
    incumbent = stacked(large)
    assert solve_mip(large, incumbent, 0.0) is incumbent


def test_too_many_pairs_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = churn(40)
    monkeypatch.setattr(mip, "MOST_PAIRS", num_pairs(problem) - 1)
    incumbent = stacked(problem)
    assert solve_mip(problem, incumbent, 20.0) is incumbent


class _Liar(pulp.LpSolver):  # type: ignore[misc]
    """Says that it is done, and gives what it likes."""

    values: float | str | None = None

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__(msg=False)

    def actualSolve(self, program: pulp.LpProblem, **_: object) -> int:
        for number, variable in enumerate(program.variables()):
            variable.varValue = -7.0 * number if self.values == "garbage" else self.values
        program.assignStatus(pulp.LpStatusOptimal)
        return int(pulp.LpStatusOptimal)


@pytest.mark.parametrize("values", [None, 0.0, float("nan"), float("inf"), "garbage"])
def test_values_of_a_solver_are_not_believed(values: float | str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Liar, "values", values)
    monkeypatch.setattr(rows, "_solver", _Liar)
    problem = churn(30)
    incumbent = stacked(problem)
    offsets = solve_mip(problem, incumbent, 20.0)
    assert validate(problem, offsets) is None
    assert height_of(problem, offsets) <= height_of(problem, incumbent)


def test_a_solver_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(_Liar):
        def actualSolve(self, program: pulp.LpProblem, **_: object) -> int:
            raise pulp.PulpSolverError("no licence")

    monkeypatch.setattr(rows, "_solver", Broken)
    problem = churn(30)
    with pytest.raises(SolverFailed, match="no licence"):
        solve_mip(problem, stacked(problem), 20.0)
