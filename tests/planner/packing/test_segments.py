from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowplan.planner.packing import Problem
from stowplan.planner.packing.segments import find_segments, whole
from tests.planner.packing.traces import churn, layered


@pytest.mark.parametrize("num_blocks", [4, 9, 40])
def test_the_passes_of_a_training_step_are_found(num_blocks: int) -> None:
    problem = layered(num_blocks)
    segments = find_segments(problem)
    assert 2 * (num_blocks - 1) <= len(segments) <= 2 * num_blocks
    lengths = [last - first for first, last in segments]
    assert len(set(lengths)) == 2  # forward and backward
    assert all(before[1] <= after[0] for before, after in pairwise(segments))


def test_cuts_are_where_least_is_alive() -> None:
    """Four allocations that outlive each other, over and over: the one moment when nothing is alive is the border."""
    lower = np.arange(40)
    upper = lower // 4 * 4 + 4
    problem = Problem(lower=lower + 1, upper=upper + 1, size=np.tile([3, 1, 4, 1], 10))
    assert find_segments(problem) == tuple((first + 1, first + 5) for first in range(0, 40, 4))


@pytest.mark.parametrize("sizes", [np.arange(1, 200), np.full(200, 7), np.array([], dtype=np.int64)])
def test_nothing_repeats(sizes: np.ndarray) -> None:
    lower = np.arange(len(sizes))
    assert find_segments(Problem(lower=lower, upper=lower + 3, size=sizes)) == ()


def test_the_whole_is_one_segment() -> None:
    problem = churn(50)
    assert whole(problem) == ((int(problem.lower.min()), int(problem.upper.max())),)
    assert whole(Problem(*np.zeros((3, 0), dtype=np.int64))) == ()


@given(st.lists(st.tuples(st.integers(-9, 40), st.integers(1, 9), st.integers(1, 3)), max_size=60))
@settings(deadline=None)
def test_segments_follow_each_other(rows: list[tuple[int, int, int]]) -> None:
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    segments = find_segments(Problem(lower=table[:, 0], upper=table[:, 0] + table[:, 1], size=table[:, 2]))
    assert all(first < last for first, last in segments)
    assert all(before[1] <= after[0] for before, after in pairwise(segments))
