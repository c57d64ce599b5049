"""Requests around the blocks, from what an outline saw."""

from __future__ import annotations

from stowplan.core.allocations import Place
from stowplan.offload.allocation_record import AllocationRecord, Happening, What
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
from stowplan.offload.capture.outside import outside_allocations


def made(address: int, num_bytes: int) -> Happening:
    return Happening(What.ALLOCATED, address, num_bytes)


def freed(address: int) -> Happening:
    return Happening(What.FREED, address)


def mark(name: str) -> Happening:
    return Happening(What.MARK, name=name)


def note(name: str, address: int) -> Happening:
    return Happening(What.NOTE, address, name=f"{name} 0")


FORWARD = [
    mark(EMBEDDING_FORWARD),
    made(1, 10),
    mark(before(0)),
    note(argument(0), 1),
    made(2, 20),
    note(output_of(0), 2),
    mark(handed_on(0)),
    freed(1),
    mark(before(1)),
    note(argument(1), 2),
    made(3, 30),
    note(output_of(1), 3),
    mark(handed_on(1)),
    made(4, 40),
]


def test_stretches_go_from_mark_to_mark() -> None:
    record = AllocationRecord(
        [
            *FORWARD,
            mark(given_back(1)),
            note(output_gradient(1), 4),
            freed(3),
            mark(after(1)),
            made(5, 50),
            mark(given_back(0)),
            note(output_gradient(0), 5),
            mark(after(0)),
            freed(4),
            mark(END),
        ]
    )
    outside = outside_allocations(record, 2, (7, ~0))
    assert outside is not None
    assert outside.stretches == ((10,), (20,), (~0,), (30,), (40,), (~2,), (50,), (), (~3,))
    assert outside.arguments == ((Place(position=0, buffer=0),), (Place(position=0, buffer=1),))
    assert outside.outputs == ((Place(position=0, buffer=1),), (Place(position=0, buffer=2),))
    assert outside.gradients == ((Place(position=0, buffer=4),), (Place(position=0, buffer=3),))
    assert outside.reached == (True, True)
    assert outside.optimizer_step == (7, ~0)


def test_backward_may_not_reach_a_frozen_block() -> None:
    record = AllocationRecord([*FORWARD, mark(given_back(1)), mark(after(1)), freed(4), mark(END)])
    outside = outside_allocations(record, 2, ())
    assert outside is not None
    assert outside.reached == (False, True)
    assert outside.stretches[5:] == ((), (~3,), (), ())


def test_another_order_of_backward_is_not_told() -> None:
    first, second = (mark(given_back(0)), mark(after(0))), (mark(given_back(1)), mark(after(1)))
    record = AllocationRecord([*FORWARD, *first, made(5, 50), *second, mark(END)])
    assert outside_allocations(record, 2, ()) is None
