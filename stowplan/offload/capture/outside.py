"""The requests of memory outside the blocks, from the record of an outline."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from stowplan.core.allocations import Events, OutsideAllocations, Place
from stowplan.offload.allocation_record import AllocationRecord
from stowplan.offload.capture.outline import (
    EMBEDDING_FORWARD,
    END,
    after,
    argument,
    before,
    given_back,
    handed_on,
    output_gradient,
    output_of,
)

__all__ = ["outside_allocations"]


def outside_allocations(record: AllocationRecord, num_calls: int, optimizer_step: Events) -> OutsideAllocations | None:
    """What ``record`` saw around ``num_calls`` calls. None where backward reaches them in another than their reverse
    order: the stretches would not be those of a step program.
    """
    forward = [EMBEDDING_FORWARD]
    for call in range(num_calls):
        forward += [before(call), handed_on(call)]
    backward = [mark for call in reversed(range(num_calls)) for mark in (given_back(call), after(call))]
    reached = tuple(given_back(call) in record.marks for call in range(num_calls))
    marks = [mark for mark in (*forward, *backward) if mark in record.marks] + [END]
    positions = [record.marks[mark] for mark in marks]
    if positions != sorted(positions):
        return None
    ends = dict(itertools.pairwise(marks))

    def stretch(mark: str) -> Events:
        return record.between(mark, ends[mark]) if mark in ends else ()

    def places(name: Callable[[int], str]) -> tuple[tuple[Place, ...], ...]:
        noted = (sorted(record.noted(name(call)).items()) for call in range(num_calls))
        return tuple(tuple(Place(position=p, buffer=b) for p, b in found) for found in noted)

    return OutsideAllocations(
        stretches=tuple(map(stretch, (*forward, *backward))),
        arguments=places(argument),
        outputs=places(output_of),
        gradients=places(output_gradient),
        reached=reached,
        optimizer_step=optimizer_step,
    )
