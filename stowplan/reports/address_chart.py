"""Where the buffers of a step live, in characters: time from left to right, addresses from the bottom up."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from stowplan.core.allocations import Addresses, Kind
from stowplan.reports.lines import Unit, clean

__all__ = ["KIND_LETTERS", "address_chart"]

KIND_LETTERS = {
    Kind.GRADIENT: "G",
    Kind.KEPT: "K",
    Kind.STAGED: "S",
    Kind.RECOMPUTED: "C",
    Kind.TRANSIENT: "T",
}
HOLE = "."
_AXIS_WIDTH = 10
_ROWS = 20


def address_chart(addresses: Addresses, unit: Unit, width: int) -> list[str]:
    """A letter for the buffer that holds the middle of each row's bytes at the middle of each column's events.

    Above the addresses of what lives all step. ``.`` is a hole: free, with something above it.
    """
    trace = addresses.trace
    room = width - _AXIS_WIDTH - 2
    num_columns = min(room, trace.num_events)
    if not num_columns or not addresses.height_bytes:
        return []
    times = [(2 * column + 1) * trace.num_events // (2 * num_columns) for column in range(num_columns)]
    levels = [(2 * row + 1) * addresses.height_bytes // (2 * _ROWS) for row in range(_ROWS)]
    grid = [[" "] * num_columns for _ in levels]
    tops = [0] * num_columns
    for allocation, offset in zip(trace.allocations, addresses.offsets, strict=True):
        end = offset + allocation.size_bytes
        for column in _between(times, allocation.lower, allocation.upper):
            tops[column] = max(tops[column], end)
            for row in _between(levels, offset, end):
                grid[row][column] = KIND_LETTERS[allocation.kind]
    for row, level in enumerate(levels):
        grid[row] = [HOLE if c == " " and level < top else c for c, top in zip(grid[row], tops, strict=True)]
    lines = [
        f"{unit.number(addresses.height_bytes * (row + 1) // _ROWS):>{_AXIS_WIDTH}} |{''.join(cells)}".rstrip()
        for row, cells in reversed(list(enumerate(grid)))
    ]
    return [*lines, " " * (_AXIS_WIDTH + 2) + _parts_axis(addresses, times)]


def _between(points: list[int], lower: int, upper: int) -> range:
    """Which of ascending ``points`` are in [lower, upper)."""
    return range(bisect_left(points, lower), bisect_left(points, upper))


def _parts_axis(addresses: Addresses, times: list[int]) -> str:
    """The phases below the columns where they begin."""
    axis, before = "", ""
    names = {mark.event: mark.name for mark in addresses.trace.marks}
    starts = sorted(names)
    for column, time in enumerate(times):
        name = names[starts[bisect_right(starts, time) - 1]]
        phase = next((way for way in ("forward", "backward") if name.startswith(f"{way} of ")), name)
        if phase != before:
            axis = axis[:column].ljust(column) + f"|{clean(phase)}"
            before = phase
    return axis[: len(times)]
