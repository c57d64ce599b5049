from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowplan.core.errors import InvalidArgument
from stowplan.planner.packing import FREE, Problem, Solution, bilevel, validate
from stowplan.planner.packing.bilevel import solve_bilevel
from stowplan.planner.packing.segments import find_segments
from tests.planner.packing.traces import churn, layered


def problem_of(rows: list[tuple[int, int, int]], fixed: list[int] | None = None) -> Problem:
    lower, upper, size = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Problem(lower=lower, upper=upper, size=size, fixed=None if fixed is None else np.array(fixed))


def test_equal_segments_are_packed_once_and_alike() -> None:
    problem = layered(6)
    segments = find_segments(problem)
    solution = solve_bilevel(problem, time_limit_seconds=5.0)
    assert validate(problem, solution.offsets) is None
    assert solution.bound_bytes == problem.bound_bytes <= solution.height_bytes
    assert solution.solver.startswith(f"bilevel (segments: {len(segments)}, different: 2, by greedy; outer: ")
    placed = set()
    for lower, upper in segments[:5]:
        inside = (problem.lower >= lower) & (problem.upper <= upper)
        offsets = solution.offsets[inside]
        placed.add(tuple((offsets - offsets.min()).tolist()))
    assert len(placed) == 1


def test_what_crosses_a_border_is_never_in_a_segment() -> None:
    """The price of two levels: a buffer that crosses cannot use the hole that the large temporary leaves."""
    problem = problem_of([(0, 1, 10), (1, 4, 1), (1, 6, 9)])
    assert problem.bound_bytes == 10
    assert solve_bilevel(problem, ((0, 6),)).height_bytes == 10
    apart = solve_bilevel(problem, ((0, 4),))
    assert apart.height_bytes == 10 + 9
    assert validate(problem, apart.offsets) is None


def test_without_structure_all_is_one_segment() -> None:
    problem = churn(20)
    solution = solve_bilevel(problem, time_limit_seconds=5.0)
    assert solution.solver == "bilevel (segments: 1, different: 1, by greedy; outer: greedy)"


def _stack(problem: Problem, **_: object) -> Solution:
    """Every buffer above the one before: a start that leaves a MIP all to do."""
    offsets = np.cumsum(problem.aligned_size) - problem.aligned_size
    return Solution(offsets, int(problem.aligned_size.sum()), problem.bound_bytes, "stack")


def test_both_levels_are_programs_where_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bilevel, "pack", _stack)
    rows = [(0, 2, 5), (1, 3, 4), (2, 4, 5), (0, 12, 3), (4, 9, 6), (8, 12, 6), (20, 22, 5), (21, 23, 4), (22, 24, 5)]
    solution = solve_bilevel(problem_of(rows), ((0, 4), (20, 24)), time_limit_seconds=20.0)
    assert solution.solver == "bilevel (segments: 2, different: 1, by MIP; outer: MIP)"
    assert solution.height_bytes == 3 + 6 + 6
    large = solve_bilevel(churn(300), ((0, 40),), time_limit_seconds=1.0)
    assert large.solver == "bilevel (segments: 1, different: 1, by MIP; outer: MIP)"
    monkeypatch.setattr(bilevel, "MOST_PAIRS", 100)
    assert solve_bilevel(churn(300), ((0, 40),), time_limit_seconds=1.0).solver.endswith("by greedy; outer: auto)")


def test_progress_is_that_of_the_outer_level_against_the_bound_of_the_whole() -> None:
    problem = churn(40)
    told: list[tuple[int, int]] = []
    solution = solve_bilevel(problem, ((5, 15),), 1.0, lambda height, bound, seconds: told.append((height, bound)))
    assert {bound for _, bound in told} == {problem.bound_bytes}
    assert min(height for height, _ in told) >= solution.height_bytes


def test_fixed_buffers_stay_and_belong_to_no_segment() -> None:
    problem = problem_of([(0, 2, 4), (1, 3, 5), (0, 9, 6)], fixed=[100, FREE, FREE])
    solution = solve_bilevel(problem, ((0, 4),))
    assert validate(problem, solution.offsets) is None
    assert solution.offsets[0] == 100


@pytest.mark.parametrize("segments", [None, (), ((0, 5),), ((0, 3), (3, 9))])
def test_no_buffers(segments: tuple[tuple[int, int], ...] | None) -> None:
    solution = solve_bilevel(problem_of([]), segments)
    assert (solution.height_bytes, solution.bound_bytes, len(solution.offsets)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        (((3, 3),), r"\[3, 3\) is empty"),
        (((0, 4), (3, 6)), r"\[3, 6\) begins before \[0, 4\) has ended"),
        (((4, 6), (0, 4)), r"\[0, 4\) begins before \[4, 6\) has ended"),
    ],
)
def test_segments_that_cannot_be(segments: tuple[tuple[int, int], ...], reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        solve_bilevel(problem_of([(0, 1, 1)]), segments)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(1, 9)), max_size=25),
    st.sets(st.integers(0, 20), min_size=2, max_size=6),
    st.sampled_from([1, 8]),
)
@settings(max_examples=30, deadline=None)
def test_addresses_are_valid_whatever_the_segments(
    rows: list[tuple[int, int, int]], borders: set[int], alignment: int
) -> None:
    lower, life, size = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    problem = Problem(lower=lower, upper=lower + life, size=size, alignment=alignment)
    edges = sorted(borders)
    segments = tuple(pairwise(edges))[::2]
    solution = solve_bilevel(problem, segments, time_limit_seconds=0.2)
    assert validate(problem, solution.offsets, solution.height_bytes) is None
    assert solution.height_bytes % alignment == 0
