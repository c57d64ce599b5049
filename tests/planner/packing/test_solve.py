from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan.core.errors import CompilationFailed, InfeasibleCapacity, InvalidArgument
from stowplan.planner.packing import FREE, Problem, library, pack, validate
from tests.planner.packing.problems import (
    DSA_CAPACITY,
    DSA_NAMES,
    churn,
    dsa,
    first_fit,
    height,
    problems,
    with_fixed,
)

SOLVERS = ("auto", "greedy", "exact", "python")


def check(problem, solution, capacity_bytes=None):
    assert validate(problem, solution.offsets, capacity_bytes) is None
    assert solution.height_bytes == height(problem, solution.offsets.tolist())
    assert problem.bound_bytes <= solution.bound_bytes <= solution.height_bytes


@pytest.mark.parametrize("solver", SOLVERS)
@given(problem=problems())
def test_addresses_are_valid_and_no_higher_than_first_fit_by_size(solver, problem):
    solution = pack(problem, solver=solver, time_limit_seconds=0.05)
    check(problem, solution)
    by_size = sorted(range(len(problem)), key=lambda i: -problem.aligned_size[i])
    assert solution.height_bytes <= height(problem, first_fit(problem, by_size, [FREE] * len(problem)))


@pytest.mark.parametrize("solver", SOLVERS)
@given(problem=problems(most=15), data=st.data())
def test_fixed_buffers_stay(solver, problem, data):
    free = pack(problem, solver="python")
    which = np.array(data.draw(st.lists(st.booleans(), min_size=len(problem), max_size=len(problem))), dtype=bool)
    moved = free.offsets + data.draw(st.integers(0, 3)) * problem.alignment
    fixed = with_fixed(problem, moved, which)
    solution = pack(fixed, solver=solver, time_limit_seconds=0.05)
    check(fixed, solution)
    assert (solution.offsets[which] == moved[which]).all()


@pytest.mark.parametrize("name", DSA_NAMES)
def test_the_six_problems_fit(name):
    problem = dsa(name)
    solution = pack(problem, capacity_bytes=DSA_CAPACITY, time_limit_seconds=120)
    check(problem, solution, DSA_CAPACITY)


def warped(problem, random):
    """Time runs unevenly."""
    times = np.unique(np.concatenate([problem.lower, problem.upper]))
    moved = np.cumsum(random.integers(1, 1000, len(times)))
    return Problem(*(moved[np.searchsorted(times, ends)] for ends in (problem.lower, problem.upper)), problem.size)


def cut(problem, random):
    """Of some buffers two, one after the other."""
    which = np.flatnonzero((random.random(len(problem)) < 0.2) & (problem.upper - problem.lower > 1))
    at = random.integers(problem.lower[which] + 1, problem.upper[which])
    first_upper = problem.upper.copy()
    first_upper[which] = at
    lower, upper = np.append(problem.lower, at), np.append(first_upper, problem.upper[which])
    return Problem(lower, upper, np.append(problem.size, problem.size[which]))


@pytest.mark.parametrize("name", ["A", "F"])
@pytest.mark.parametrize("change", [warped, cut])
def test_so_do_variants_of_them(name, change):
    problem = change(dsa(name), np.random.default_rng(0))
    solution = pack(problem, capacity_bytes=DSA_CAPACITY, solver="exact", time_limit_seconds=120)
    check(problem, solution, DSA_CAPACITY)


def test_a_chain_that_cannot_stay_in_one_place_proves_nothing():
    hard, half = dsa("B"), DSA_CAPACITY // 2  # no greedy order fits it
    end = int(hard.upper.max())
    lower, upper = np.array([0, 0, 1, 1]) + end, np.array([1, 1, 2, 2]) + end
    problem = Problem(
        np.append(hard.lower, lower),
        np.append(hard.upper, upper),
        np.append(hard.size, [half] * 4),
        fixed=np.append(np.full(len(hard), FREE), [0, FREE, half, FREE]),  # one free above, then one free below
    )
    solution = pack(problem, capacity_bytes=DSA_CAPACITY, solver="exact", time_limit_seconds=120)
    check(problem, solution, DSA_CAPACITY)
    assert solution.offsets[-3:].tolist() == [half, half, 0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_few_buffers(solver):
    assert pack(Problem([], [], []), solver=solver).height_bytes == 0
    one = pack(Problem([3], [4], [10], alignment=8), solver=solver)
    assert (one.offsets.tolist(), one.height_bytes, one.bound_bytes, one.gap) == ([0], 16, 16, 0.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_extreme_numbers(solver):
    largest = pack(Problem([-(2**63), 0], [2**63 - 1, 1], [2**59, 2**59]), solver=solver)
    assert largest.height_bytes == 2**60
    fixed = Problem([0, 0], [1, 1], [2**59, 2**59], fixed=[2**60, FREE])
    assert pack(fixed, solver=solver).offsets.tolist() == [2**60, 0]
    equal = pack(Problem([0] * 300, [1] * 300, [7] * 300), solver=solver, time_limit_seconds=0.5)
    assert sorted(equal.offsets.tolist()) == list(range(0, 2100, 7))


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_alive_together_proves(solver):
    problem = Problem([0, 0], [1, 1], [30, 40], alignment=8)
    with pytest.raises(InfeasibleCapacity, match=r"within 71 bytes; it takes at least 72: so many are alive") as caught:
        pack(problem, capacity_bytes=71, solver=solver)
    assert (caught.value.capacity_bytes, caught.value.least_bytes) == (71, 72)
    assert pack(problem, capacity_bytes=72, solver=solver).height_bytes == 72


def test_a_capacity_ends_the_search():
    problem = churn(3000)
    loose = int(1.5 * problem.bound_bytes)
    solution = pack(problem, capacity_bytes=loose, time_limit_seconds=60)
    assert solution.height_bytes <= loose
    assert solution.seconds < 60


def test_local_search_betters_the_orders():
    problem = churn(6000)
    greedy, auto = pack(problem, solver="greedy"), pack(problem, time_limit_seconds=10)
    assert auto.height_bytes < greedy.height_bytes or auto.gap == 0


def test_layers_are_packed_at_their_bound():
    begins = np.arange(40)  # each layer: one buffer until its backward, one only in forward, one only in backward
    lower = np.concatenate([10 * begins, 10 * begins, 10 * (79 - begins)])
    upper = np.concatenate([10 * (80 - begins), 10 * begins + 5, 10 * (79 - begins) + 5])
    problem = Problem(lower, upper, np.repeat([300, 500, 700], 40))
    assert pack(problem, solver="greedy").gap == 0


def test_progress_is_told_and_may_stop():
    told = []
    problem = dsa("D")  # the least height above its bound is not known

    def stop_at_the_third(*report):
        told.append(report)
        return len(told) == 3

    solution = pack(problem, time_limit_seconds=60, on_progress=stop_at_the_third)
    assert len(told) == 3
    heights, bounds, seconds = zip(*told, strict=True)
    assert sorted(heights, reverse=True) == list(heights)
    assert heights[-1] >= solution.height_bytes >= solution.bound_bytes >= bounds[-1] >= problem.bound_bytes
    assert sorted(seconds) == list(seconds)
    assert solution.seconds < 60


def test_progress_of_packing_in_python_is_told_after_each_order():
    told = []
    problem = dsa("D")
    check(problem, pack(problem, solver="python", on_progress=lambda *report: told.append(report)))
    assert len(told) == 3
    assert [bound for _, bound, _ in told] == [problem.bound_bytes] * 3
    first = pack(problem, solver="python", on_progress=lambda *report: True)
    assert first.height_bytes == told[0][0] > problem.bound_bytes


def test_what_progress_raises_comes_out():
    def fail(*report):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pack(dsa("D"), on_progress=fail)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_comes_out():
    def interrupt_soon(*report):
        if not timers:
            timers.append(threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)))
            timers[0].start()

    timers: list[threading.Timer] = []
    with pytest.raises(KeyboardInterrupt):
        pack(dsa("D"), time_limit_seconds=60, on_progress=interrupt_soon)


def test_no_time_is_enough_for_an_answer():
    problem = churn(20_000)
    for solver in ("auto", "greedy", "python"):
        small = problem if solver != "python" else churn(500)
        check(small, pack(small, solver=solver, time_limit_seconds=0))


def test_many_threads_at_once():
    wanted = pack(churn(500), solver="greedy").height_bytes
    heights = []
    threads = [
        threading.Thread(target=lambda: heights.append(pack(churn(500), solver="greedy").height_bytes))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heights == [wanted] * 4


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"solver": "best"}, "solver='best': give one of auto, greedy, exact, python"),
        ({"time_limit_seconds": float("nan")}, "time_limit_seconds=nan"),
        ({"time_limit_seconds": -1}, "time_limit_seconds=-1"),
        ({"capacity_bytes": -1}, "capacity_bytes=-1"),
        ({"capacity_bytes": 2**62}, "below 2\\*\\*62"),
        ({"capacity_bytes": 4e9}, "capacity_bytes=4000000000.0: give a whole number"),
    ],
)
def test_arguments_that_are_none(given_, message):
    with pytest.raises(InvalidArgument, match=message):
        pack(Problem([0], [1], [1]), **given_)


@pytest.mark.parametrize("upper", [[1.5], [float("nan")], [2**63], [2**64], [[1]], ["1"]])
def test_times_that_are_no_whole_numbers_of_64_bits(upper):
    with pytest.raises(InvalidArgument, match=r"upper has .* give a list of whole numbers"):
        Problem([0], upper, [1])
    assert Problem([0], np.array([1], dtype=np.uint64), [1]).upper.dtype == np.int64


def test_fixed_buffers_that_overlap():
    problem = Problem([0, 0, 0], [2, 2, 2], [4, 5, 5], fixed=[0, FREE, 3], names=["a", "b", "c"])
    with pytest.raises(InvalidArgument, match=r"buffers a and c share bytes: \[0, 4\) and \[3, 8\)"):
        pack(problem)


def test_too_many_for_the_exact_search():
    one = dsa("A")
    shifts = np.repeat(np.arange(30) * int(one.upper.max()), len(one))  # thirty times, one after the other
    many = Problem(np.tile(one.lower, 30) + shifts, np.tile(one.upper, 30) + shifts, np.tile(one.size, 30))
    with pytest.raises(InvalidArgument, match=r'4620 buffers are too many for the exact search.*solver="auto"'):
        pack(many, solver="exact", time_limit_seconds=1)


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(library, "_HERE", tmp_path)  # no prebuilt library either
    library.library.cache_clear()
    problem = churn(50)
    with pytest.warns(RuntimeWarning, match=r'solver="python", which is slow .*CXX=.no-such-compiler'):
        solution = pack(problem)
    check(problem, solution)
    assert solution.solver == "python"
    with pytest.raises(CompilationFailed):
        pack(problem, solver="exact")
    library.library.cache_clear()


@given(problem=problems(most=25))
def test_python_and_compiled_answer_alike(problem):
    slow, quick = pack(problem, solver="python"), pack(problem, time_limit_seconds=0.05)
    assert slow.bound_bytes == problem.bound_bytes <= quick.bound_bytes
    assert quick.height_bytes <= slow.height_bytes
