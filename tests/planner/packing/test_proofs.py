"""What the exact search claims, against a search that tries every order: with all rules, without any, with some."""

from __future__ import annotations

import itertools

import numpy as np
import pulp
import pytest

from stowplan.core.errors import InfeasibleCapacity
from stowplan.planner.packing import FREE, Problem, pack, validate
from stowplan.planner.packing.library import ALL_RULES, Method, run
from tests.planner.packing.problems import least_height

# Least heights above the bound, by hand: (problem, bound, least).
GAPS = (
    # The fixed buffer leaves 3 bytes below it, where 4 are wanted.
    (Problem([0, 0], [1, 1], [2, 4], fixed=[3, FREE]), 6, 9),
    # Aligned to 8, each of the two takes 8: a bound of bytes alone would be 10.
    (Problem([0, 0], [1, 1], [5, 5], alignment=8), 16, 16),
    # Found among random ones; whoever fills 7 bytes at each of seven times must cut one of the buffers in two.
    (
        Problem(
            [2, 3, 0, 1, 0, 2, 1, 0, 5, 6],
            [7, 6, 3, 3, 5, 5, 2, 1, 6, 7],
            [2, 3, 2, 1, 1, 1, 3, 4, 2, 5],
        ),
        7,
        8,
    ),
)  # fmt: skip


def tight(random: np.random.Generator, most: int) -> Problem:
    """Random buffers, and more of them wherever less than the most is alive: bounds are often too low for these."""
    count, horizon = int(random.integers(most // 2, most)), int(random.integers(4, 8))
    lower = random.integers(0, horizon, count)
    upper = lower + random.integers(1, 6, count)
    size = random.integers(1, random.integers(4, 10), count)
    live = [int(size[(lower <= time) & (time < upper)].sum()) for time in range(horizon + 6)]
    for time, bytes_ in enumerate(live):
        if 0 < bytes_ < max(live) and len(lower) < most:
            lower, upper = np.append(lower, time), np.append(upper, time + 1)
            size = np.append(size, max(live) - bytes_)
    fixed = np.full(len(lower), FREE)
    if random.random() < 0.3:
        fixed[random.integers(len(lower))] = random.integers(0, 8)
    return Problem(lower, upper, size, fixed=fixed)


def decide(problem: Problem, capacity_bytes: int, rules: int) -> bool:
    """True: packed, and that is checked. False: claimed impossible."""
    solution = run(problem, Method.EXACT, capacity_bytes, 60.0, rules=rules)
    if solution.bound_bytes > capacity_bytes:
        return False
    assert validate(problem, solution.offsets, capacity_bytes) is None
    return True


def test_claims_are_those_of_a_search_through_all_orders():
    random = np.random.default_rng(0)
    gaps = 0
    for _ in range(200):
        problem = tight(random, most=6)
        least = least_height(problem)
        gaps += least > problem.bound_bytes
        for rules in (ALL_RULES, 0, int(random.integers(ALL_RULES))):
            for capacity in {problem.bound_bytes, least - 1, least}:
                assert decide(problem, capacity, rules) == (capacity >= least), (problem, capacity, rules)
    assert gaps > 5, "without gaps nothing is proved by search"


@pytest.mark.slow
def test_claims_on_larger_problems_are_those_of_a_mip():
    random = np.random.default_rng(1)
    claims = 0
    for _ in range(40):
        problem = tight(random, most=13)
        rules = int(random.choice([ALL_RULES, int(random.integers(ALL_RULES))]))
        if not decide(problem, problem.bound_bytes, rules):
            claims += 1
            assert not mip_fits(problem, problem.bound_bytes), (problem, rules)
    assert claims > 3, "what is not claimed is not tested"


def mip_fits(problem: Problem, capacity_bytes: int) -> bool:
    """Whether a packing exists, by a MIP that orders each pair of buffers that are alive together."""
    program = pulp.LpProblem()
    offsets = [program.add_variable(f"at{i}", 0, capacity_bytes - int(size)) for i, size in enumerate(problem.size)]
    program += 0
    for j, i in itertools.combinations(range(len(problem)), 2):
        if problem.lower[i] < problem.upper[j] and problem.lower[j] < problem.upper[i]:
            above = program.add_variable(f"above{i}_{j}", cat="Binary")
            program += offsets[i] + int(problem.size[i]) <= offsets[j] + capacity_bytes * above
            program += offsets[j] + int(problem.size[j]) <= offsets[i] + capacity_bytes * (1 - above)
    for i, at in enumerate(problem.fixed):
        if at != FREE:
            program += offsets[i] == int(at)
    status = program.solve(pulp.HiGHS(msg=False, threads=1))
    assert status in (pulp.LpStatusOptimal, pulp.LpStatusInfeasible)
    return status == pulp.LpStatusOptimal


@pytest.mark.parametrize(("problem", "bound", "least"), GAPS)
def test_gaps_made_by_hand(problem, bound, least):
    assert problem.bound_bytes == bound
    for solver in ("auto", "exact"):
        solution = pack(problem, solver=solver)
        assert (solution.height_bytes, solution.bound_bytes, solution.gap) == (least, least, 0.0)
        assert pack(problem, capacity_bytes=least, solver=solver).height_bytes == least
        for capacity in range(bound, least):
            with pytest.raises(InfeasibleCapacity, match="an exact search") as caught:
                pack(problem, capacity_bytes=capacity, solver=solver)
            assert capacity < caught.value.least_bytes <= least


def test_greedy_claims_no_gap():
    problem, bound, least = GAPS[0]
    solution = pack(problem, capacity_bytes=bound, solver="greedy")
    assert (solution.height_bytes, solution.bound_bytes) == (least, bound)
