"""From an allocator's log to lifetimes, and from lifetimes to addresses.

Time is counted in requests: block k lives from request k up to the first request that is made after it was freed.

Note: blocks that cross the end of a step
    Gradients that are zeroed at the start of the next step, and whatever else outlives the marker by a little, come
    back in every step: such a block lives at the end of a step, from its request on, and at the beginning, until the
    one before it is freed. At the marker all of these are alive together, so they are laid side by side at the
    bottom, the earliest request lowest, and what lies between is planned around them: while they are gone their bytes
    serve others. A block that is still there when its successor is asked for (an output that is bound to the same
    name) would need two addresses, and is left to the allocator; so is what stays (parameters, states of optimizers).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stowplan.offload.arena.library import ALLOCATE, Integers

__all__ = ["Layout", "Packer", "StepLog", "lay_out"]

FREE = -1  # no address is given
ALIVE = -1  # no end within the step

Packer = Callable[[Integers, Integers, Integers, Integers, int], tuple[Integers, int]]
"""(lower, upper, size, fixed offsets or FREE, alignment) to (offsets, height in bytes)."""


@dataclass(frozen=True, eq=False)
class StepLog:
    """One step's requests in order, int64 [n] each, and which blocks of earlier steps were freed in it."""

    blocks: Integers
    sizes: Integers
    threads: Integers
    streams: Integers
    ends: Integers  # requests before the free, ALIVE if there was none
    freed_before: dict[int, int]  # block of an earlier step: requests before its free

    @classmethod
    def of(cls, events: Integers) -> StepLog:
        """Read events [n, 5] of one step: kind, block, size, thread, stream."""
        requests = events[:, 0] == ALLOCATE
        made = events[requests]
        request_of = {block: request for request, block in enumerate(made[:, 1].tolist())}
        ends = np.full(len(made), ALIVE, np.int64)
        freed_before: dict[int, int] = {}
        requests_before = np.cumsum(requests)
        for block, before in zip(events[~requests, 1].tolist(), requests_before[~requests].tolist(), strict=True):
            if block in request_of:
                ends[request_of[block]] = before
            else:
                freed_before[block] = before
        return cls(made[:, 1], made[:, 2], made[:, 3], made[:, 4], ends, freed_before)

    def __len__(self) -> int:
        return len(self.sizes)

    def lanes(self) -> dict[tuple[int, int], Integers]:
        """Request numbers of each (thread, stream), the one with most bytes first."""
        found: dict[tuple[int, int], list[int]] = defaultdict(list)
        for request, lane in enumerate(zip(self.threads.tolist(), self.streams.tolist(), strict=True)):
            found[lane].append(request)
        lanes = {lane: np.array(requests, np.int64) for lane, requests in found.items()}
        return dict(sorted(lanes.items(), key=lambda item: -int(self.sizes[item[1]].sum())))

    def asks_like(self, other: StepLog) -> bool:
        """Whether both ask for the same sizes, in the same lanes and order."""
        return all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("sizes", "threads", "streams")
        )


@dataclass(frozen=True, eq=False)
class Layout:
    """An address for each request, int64 [n]; FREE: none."""

    offsets: Integers
    height_bytes: int


def lay_out(step: StepLog, before: StepLog, alignment: int, pack: Packer) -> Layout:
    """Addresses for what ``step`` asks for; the step ``before`` it says what crosses from one to the next.

    Streams do not share bytes: one would have to wait for the other.
    """
    ends, arrivals = _cycles(step, before)
    offsets = np.full(len(step), FREE, np.int64)
    height = 0
    for stream in np.unique(step.streams).tolist():
        planned = np.flatnonzero((step.streams == stream) & ((ends != ALIVE) | (arrivals != ALIVE)))
        if len(planned):
            within, top = _lay_out_stream(step, planned, ends, arrivals, alignment, pack)
            offsets[planned] = within + height
            height += top
    return Layout(offsets, height)


def _cycles(step: StepLog, before: StepLog) -> tuple[Integers, Integers]:
    """For each request: when its block ends in the step, or else when the one of the step before ends in this one."""
    ends = step.ends.copy()
    arrivals = np.full(len(step), ALIVE, np.int64)
    if step.asks_like(before):
        both = (ends != ALIVE) & (before.ends != ALIVE)
        ends[both] = np.maximum(ends, before.ends)[both]
        ends[~both] = ALIVE
        pairs = [(request, int(before.blocks[request])) for request in np.flatnonzero(ends == ALIVE).tolist()]
    else:
        pairs = _paired_by_size(step, before)
    for request, block in pairs:
        end = step.freed_before.get(block, ALIVE)
        if end <= request:
            arrivals[request] = end
    return ends, arrivals


def _paired_by_size(step: StepLog, before: StepLog) -> list[tuple[int, int]]:
    """What crosses out of a step, beside what crossed into it, where the two steps differ: in order, by size."""
    waiting: dict[int, list[int]] = defaultdict(list)
    for block, size in zip(before.blocks.tolist()[::-1], before.sizes.tolist()[::-1], strict=True):
        if block in step.freed_before:
            waiting[size].append(block)
    crossing = [(request, int(step.sizes[request])) for request in np.flatnonzero(step.ends == ALIVE).tolist()]
    return [(request, waiting[size].pop()) for request, size in crossing if waiting[size]]


def _lay_out_stream(
    step: StepLog, planned: Integers, ends: Integers, arrivals: Integers, alignment: int, pack: Packer
) -> tuple[Integers, int]:
    """Offsets of ``planned`` requests, and their height. See the note on what crosses the end of a step."""
    num_requests = len(step)
    sizes = step.sizes[planned]
    crosses = ends[planned] == ALIVE
    aligned = -(-sizes // alignment) * alignment
    stacked = np.cumsum(np.where(crosses, aligned, 0)) - aligned
    fixed = np.where(crosses, stacked, FREE)
    returns = crosses & (arrivals[planned] > 0)  # a second piece of time, at the same address
    lower = np.concatenate([planned, np.zeros(int(returns.sum()), np.int64)])
    upper = np.concatenate([np.where(crosses, num_requests, ends[planned]), arrivals[planned][returns]])
    offsets, height = pack(
        lower, upper, np.concatenate([sizes, sizes[returns]]), np.concatenate([fixed, fixed[returns]]), alignment
    )
    return offsets[: len(planned)], height
