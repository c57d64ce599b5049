"""From logs to lifetimes: what ends within a step, what crosses into the next, what stays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan.offload.arena.library import ALLOCATE, FREE
from stowplan.offload.arena.lifetimes import StepLog, lay_out
from stowplan.planner.packing import Problem, pack

Array = npt.NDArray[np.int64]
ALIGNMENT = 64
NOTHING = StepLog.of(np.empty((0, 5), np.int64))


def packed(lower: Array, upper: Array, size: Array, fixed: Array, alignment: int) -> tuple[Array, int]:
    solution = pack(Problem(lower, upper, size, alignment=alignment, fixed=fixed), solver="greedy")
    return solution.offsets, solution.height_bytes


def log(*events: tuple[int, int] | tuple[int, int, int]) -> StepLog:
    """(block, size) asks, (block, 0) frees; a third number is the stream."""
    rows = [
        (ALLOCATE if event[1] else FREE, event[0], event[1], 0, event[2:][0] if event[2:] else 0) for event in events
    ]
    return StepLog.of(np.array(rows, np.int64).reshape(-1, 5))


def test_blocks_that_end_within_the_step_share_bytes() -> None:
    step = log((0, 100), (0, 0), (1, 100), (2, 100), (1, 0), (2, 0))
    layout = lay_out(step, NOTHING, ALIGNMENT, packed)
    assert layout.offsets[0] in layout.offsets[1:]
    assert layout.height_bytes == 2 * 128


def test_what_stays_has_no_address() -> None:
    step = log((0, 100), (1, 64), (1, 0))
    layout = lay_out(step, NOTHING, ALIGNMENT, packed)
    assert layout.offsets.tolist() == [-1, 0]
    assert layout.height_bytes == 64


def test_what_crosses_the_end_lends_its_bytes_between() -> None:
    """A gradient that is freed at the start of the next step, beside an activation of the forward pass."""
    before = log((0, 640), (0, 0), (1, 640))
    step = log((1, 0), (2, 640), (2, 0), (3, 640))
    layout = lay_out(step, before, ALIGNMENT, packed)
    assert layout.offsets.tolist() == [0, 0]
    assert layout.height_bytes == 640


def test_what_crosses_is_in_the_way_until_it_is_freed() -> None:
    before = log((0, 640), (0, 0), (1, 640))
    step = log((2, 640), (2, 0), (1, 0), (3, 640))
    layout = lay_out(step, before, ALIGNMENT, packed)
    assert sorted(layout.offsets.tolist()) == [0, 640]


def test_an_output_that_waits_for_its_successor_is_left_alone() -> None:
    before = log((0, 640))
    step = log((1, 640), (0, 0))
    assert lay_out(step, before, ALIGNMENT, packed).offsets.tolist() == [-1]


def test_lifetimes_are_the_longest_of_both_steps() -> None:
    before = log((0, 64), (1, 64), (0, 0), (2, 64), (1, 0), (2, 0))
    step = log((3, 64), (3, 0), (4, 64), (4, 0), (5, 64), (5, 0))
    offsets = lay_out(step, before, ALIGNMENT, packed).offsets.tolist()
    assert offsets[0] != offsets[1] != offsets[2]


def test_steps_that_differ_are_paired_by_size() -> None:
    before = log((0, 64), (0, 0), (1, 640), (2, 320), (9, 128))
    step = log((1, 0), (2, 0), (3, 128), (3, 0), (4, 640), (5, 320), (6, 128))
    layout = lay_out(step, before, ALIGNMENT, packed)
    assert layout.offsets.tolist() == [0, 0, 640, -1]  # the last one's partner is still there


def test_streams_do_not_share_bytes() -> None:
    step = log((0, 64), (0, 0), (1, 64, 7), (1, 0, 7), (2, 64), (2, 0))
    layout = lay_out(step, NOTHING, ALIGNMENT, packed)
    assert layout.offsets.tolist() == [0, 64, 0]
    assert layout.height_bytes == 128


def test_lanes_are_ordered_by_bytes() -> None:
    step = log((0, 64), (1, 640, 7), (2, 64))
    assert [(lane, requests.tolist()) for lane, requests in step.lanes().items()] == [((0, 7), [1]), ((0, 0), [0, 2])]


@st.composite
def two_steps(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """The same requests twice; each block is freed in its step, in the next one, or never."""
    count = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.sampled_from([64, 100, 640]), min_size=count, max_size=count))
    ends = draw(st.lists(st.integers(0, 2 * count + 3), min_size=count, max_size=count))
    steps: list[list[tuple[int, int]]] = [[], [], []]
    for step in range(3):
        for moment in range(count):
            for at in (moment + count * back for back in (0, 1)):
                for request, end in enumerate(ends):
                    owner = step - at // count
                    if end == at and end > request and owner >= 0:
                        steps[step].append((owner * count + request, 0))
            steps[step].append((step * count + moment, sizes[moment]))
    return steps


@given(two_steps())
def test_steady_steps_never_overlap(steps: list[list[tuple[int, int]]]) -> None:
    """Followed in every step, the addresses of blocks that are alive together are apart."""
    layout = lay_out(log(*steps[2]), log(*steps[1]), ALIGNMENT, packed)
    count = len(layout.offsets)
    alive: dict[int, tuple[int, int]] = {}
    for block, size in [event for step in steps for event in step]:
        if not size:
            alive.pop(block, None)
        elif layout.offsets[block % count] >= 0:
            start = int(layout.offsets[block % count])
            assert all(start + size <= other or end <= start for other, end in alive.values())
            assert start + size <= layout.height_bytes
            alive[block] = (start, start + size)


def test_an_empty_log_is_an_empty_layout() -> None:
    layout = lay_out(NOTHING, NOTHING, ALIGNMENT, packed)
    assert (len(layout.offsets), layout.height_bytes) == (0, 0)


@pytest.mark.parametrize("column", range(5))
def test_columns_of_a_log(column: int) -> None:
    events = np.array([[1, 10, 64, 0, 0], [1, 11, 65, 1, 2], [-1, 10, 64, 0, 0], [-1, 5, 9, 0, 0]], np.int64)
    step = StepLog.of(events)
    found = [len(step), step.blocks.tolist(), step.sizes.tolist(), step.ends.tolist(), step.freed_before]
    assert found[column] == [2, [10, 11], [64, 65], [2, -1], {5: 2}][column]
