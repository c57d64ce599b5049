"""Buffers with lifetimes, and requests that a plan file has."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan.core.allocations import (
    Allocation,
    AllocationTrace,
    BlockAllocations,
    Kind,
    Mark,
    OutsideAllocations,
    Place,
    check_block_allocations,
    check_outside_allocations,
    num_buffers,
)
from stowplan.core.records import RecordError

TRACE = AllocationTrace(
    allocations=(
        Allocation(100, 0, 3, Kind.KEPT, "forward of layers.0"),
        Allocation(10, 1, 2, Kind.TRANSIENT, "forward of layers.0"),
        Allocation(50, 4, 6, Kind.GRADIENT, 'backward of "a", b'),
    ),
    marks=(Mark(0, "forward of layers.0"), Mark(3, "nothing"), Mark(4, 'backward of "a", b')),
    num_events=6,
)


def test_live_bytes_after_each_event() -> None:
    assert TRACE.live_bytes == (100, 110, 100, 0, 50, 50)
    assert TRACE.bound_bytes == 110


def test_peaks_of_parts_have_what_is_alive_as_they_begin() -> None:
    assert TRACE.peak_bytes_by_part() == {"forward of layers.0": 110, "nothing": 100, 'backward of "a", b': 50}


def test_nothing_lives_in_an_empty_trace() -> None:
    empty = AllocationTrace((), (), 0)
    assert (empty.live_bytes, empty.bound_bytes) == ((), 0)


def test_csv_reads_back() -> None:
    rows = list(csv.DictReader(TRACE.to_csv().splitlines()))
    assert [
        Allocation(int(r["size"]), int(r["lower"]), int(r["upper"]), Kind(r["kind"]), r["segment"]) for r in rows
    ] == list(TRACE.allocations)
    assert [r["id"] for r in rows] == ["0", "1", "2"]


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 20), st.integers(1, 20))))
def test_the_bound_is_the_most_that_lives_together(buffers: list[tuple[int, int, int]]) -> None:
    allocations = tuple(Allocation(size, lower, lower + length, Kind.TRANSIENT, "") for size, lower, length in buffers)
    trace = AllocationTrace(allocations, (), 41)
    assert trace.bound_bytes == max(
        sum(a.size_bytes for a in allocations if a.lower <= time < a.upper) for time in range(41)
    )


BLOCK = BlockAllocations(
    forward=(8, 4, ~1),
    backward=(2, ~2, ~0),
    saved=(0, -1),
    outputs=(Place(position=0, buffer=0),),
    output_gradients=(Place(position=0, buffer=2),),
    input_gradients=(3,),
)
OUTSIDE = OutsideAllocations(
    stretches=((8,), (), (~0, 4), (~1,), ()),
    arguments=((Place(position=0, buffer=0),),),
    outputs=((),),
    gradients=((Place(position=0, buffer=1),),),
    reached=(True,),
    optimizer_step=(4, ~0),
)


def test_what_makes_sense_passes() -> None:
    check_block_allocations(BLOCK, 2, 3, "$")
    check_outside_allocations(OUTSIDE, 1, "$")
    assert num_buffers(BLOCK.forward) == 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"forward": (8, ~1)}, r"event 1 \(-2\) neither"),
        ({"forward": (8, 0)}, r"event 1 \(0\) neither"),
        ({"backward": (~0, ~0)}, "neither allocates bytes nor frees a live buffer"),
        ({"saved": (0,)}, r"\.saved: 1 buffers of 2"),
        ({"saved": (0, 4)}, "4 is not between 0 and 3"),
        ({"lingering": (-1,)}, "-1 is not between"),
        ({"outputs": (Place(position=0, buffer=9),)}, "9 is not between"),
        ({"arguments": (Place(position=0, buffer=3),)}, r"\.arguments: 3 is not between 0 and 2"),
    ],
)
def test_a_block_that_makes_no_sense(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(RecordError, match=complaint):
        check_block_allocations(replace(BLOCK, **change), 2, 3, "$")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stretches": ((8,),)}, "1 for 1 blocks"),
        ({"stretches": ((~0,), (), (), (), ())}, r"\.stretches: event 0"),
        ({"optimizer_step": (~0,)}, r"\.optimizer_step: event 0"),
        ({"reached": ()}, r"\.reached: 0 for 1"),
        ({"gradients": ((Place(position=0, buffer=2),),)}, "2 is not between 0 and 1"),
    ],
)
def test_surroundings_that_make_no_sense(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(RecordError, match=complaint):
        check_outside_allocations(replace(OUTSIDE, **change), 1, "$")
