"""Memory as a training step asks for it: which buffers, how large, from when to when, and what for.

``BlockAllocations`` and ``OutsideAllocations`` are what a capture saw: requests in order. ``AllocationTrace`` is a
whole step under some decisions: buffers with lifetimes, which a packer can give addresses. What lives all step
(parameters, optimizer states, buffers, the batch) is in none of them.

Note: events
    Requests are whole numbers in order of time. A positive one allocates so many bytes; buffers are numbered from 0 in
    the order in which they appear. ``~n`` (that is -n - 1) frees buffer number n.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from io import StringIO
from itertools import accumulate

from stowplan.core.records import RecordError

__all__ = [
    "Addresses",
    "Allocation",
    "AllocationTrace",
    "BlockAllocations",
    "Events",
    "Kind",
    "Mark",
    "OutsideAllocations",
    "Place",
    "check_block_allocations",
    "check_outside_allocations",
    "num_buffers",
]

Events = tuple[int, ...]


class Kind(StrEnum):
    """What a buffer is for.

    A block's *skeletal* values, which autograd saves for backward, are ``KEPT``, ``STAGED`` or ``RECOMPUTED`` by what
    the plan does with them; those that are dropped as their block's forward ends are ``TRANSIENT`` until then.
    """

    GRADIENT = "gradient"  # of a parameter, made in this step
    KEPT = "kept"  # there from forward to backward; outside the blocks: alive while a block works
    STAGED = "staged"  # a swapped value on the device: until it has left, and since it is back
    RECOMPUTED = "recomputed"  # a saved value that is made again for backward
    TRANSIENT = "transient"  # everything else within one forward, backward, phase or replay


# ---- what a capture saw ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Buffer number ``buffer`` is argument, output or gradient number ``position`` of a block's call."""

    position: int
    buffer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockAllocations:
    """The requests of one block's forward and backward, everything kept. Buffers are numbered through both.

    Its inputs are not among them. ``saved`` has the buffer of each saved value, in the order of
    ``BlockProgram.saved``, -1 for those that are none of its own (inputs). ``lingering`` buffers are not saved, and
    stay until the forward pass ends. Positions of arguments and outputs count all leaves, those of gradients the
    tensors of the output that need one.
    """

    forward: Events
    backward: Events
    saved: tuple[int, ...]
    lingering: tuple[int, ...] = ()
    arguments: tuple[Place, ...] = ()  # ``buffer`` is the number of the value in the program
    outputs: tuple[Place, ...] = ()
    output_gradients: tuple[Place, ...] = ()  # buffers that are there as backward begins, allocated after forward's
    input_gradients: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutsideAllocations:
    """The requests outside the blocks, of which each only makes its outputs and hands gradients on.

    Attributes:
        stretches: events by part of the step: what precedes the first block; each block's call and what follows it
            (the last time that is the head); then for each block in reverse its backward, and what follows that. 4n + 1
            for n blocks. Buffers are numbered through all.
        arguments: for each block, the buffers that its call was given.
        outputs: for each block, those that it gave.
        gradients: for each block, those of its outputs' gradients as its backward begins.
        reached: whether backward reaches the block.
        optimizer_step: events of the optimizer's step, with buffer numbers of their own.
    """

    stretches: tuple[Events, ...]
    arguments: tuple[tuple[Place, ...], ...]
    outputs: tuple[tuple[Place, ...], ...]
    gradients: tuple[tuple[Place, ...], ...]
    reached: tuple[bool, ...]
    optimizer_step: Events = ()


def num_buffers(events: Iterable[int]) -> int:
    """How many buffers events allocate."""
    return sum(event > 0 for event in events)


def check_block_allocations(block: BlockAllocations, num_saved: int, num_values: int, path: str) -> None:
    """Raise RecordError, naming the place, where events or numbers of buffers make no sense."""
    gradients = (1,) * len({place.buffer for place in block.output_gradients})  # of unknown sizes
    events = (*block.forward, *gradients, *block.backward)
    _check_events(events, f"{path}.forward and .backward")
    if len(block.saved) != num_saved:
        raise RecordError(f"{path}.saved: {len(block.saved)} buffers of {num_saved} saved values")
    numbers = [*block.lingering, *block.input_gradients, *(n for n in block.saved if n != -1)]
    numbers += [place.buffer for places in (block.outputs, block.output_gradients) for place in places]
    _check_numbers(numbers, num_buffers(events), path)
    _check_numbers([place.buffer for place in block.arguments], num_values, f"{path}.arguments")


def check_outside_allocations(outside: OutsideAllocations, num_blocks: int, path: str) -> None:
    """Raise RecordError, naming the place, where events or numbers of buffers make no sense."""
    if len(outside.stretches) != 4 * num_blocks + 1:
        raise RecordError(f"{path}.stretches: {len(outside.stretches)} for {num_blocks} blocks")
    for name in ("arguments", "outputs", "gradients", "reached"):
        if len(getattr(outside, name)) != num_blocks:
            raise RecordError(f"{path}.{name}: {len(getattr(outside, name))} for {num_blocks} blocks")
    events = [event for stretch in outside.stretches for event in stretch]
    _check_events(events, f"{path}.stretches")
    _check_events(outside.optimizer_step, f"{path}.optimizer_step")
    tables = (*outside.arguments, *outside.outputs, *outside.gradients)
    _check_numbers([place.buffer for places in tables for place in places], num_buffers(events), path)


def _check_events(events: Sequence[int], path: str) -> None:
    live: set[int] = set()
    count = 0
    for number, event in enumerate(events):
        if event > 0:
            live.add(count)
            count += 1
        elif event == 0 or ~event not in live:
            raise RecordError(f"{path}: event {number} ({event}) neither allocates bytes nor frees a live buffer")
        else:
            live.remove(~event)


def _check_numbers(numbers: Iterable[int], count: int, path: str) -> None:
    for number in numbers:
        if not 0 <= number < count:
            raise RecordError(f"{path}: {number} is not between 0 and {count - 1}")


# ---- a step under some decisions -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Allocation:
    """One buffer: bytes, and a lifetime [lower, upper) in event numbers; ``segment`` is where it was allocated."""

    size_bytes: int
    lower: int
    upper: int
    kind: Kind
    segment: str


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a part of the step begins: the number of its first event, and its name as in ``Prediction.moments``."""

    event: int
    name: str


@dataclass(frozen=True)
class AllocationTrace:
    """The buffers of one step in order of allocation, and where its parts begin. ``num_events`` ends the step."""

    allocations: tuple[Allocation, ...]
    marks: tuple[Mark, ...]
    num_events: int

    @cached_property
    def live_bytes(self) -> tuple[int, ...]:
        """Bytes that are alive after each event."""
        changes = [0] * (self.num_events + 1)
        for allocation in self.allocations:
            changes[allocation.lower] += allocation.size_bytes
            changes[allocation.upper] -= allocation.size_bytes
        return tuple(accumulate(changes[:-1]))

    @property
    def bound_bytes(self) -> int:
        """The most bytes that are alive together: no addresses can do with less."""
        return max(self.live_bytes, default=0)

    def peak_bytes_by_part(self) -> dict[str, int]:
        """The highest live bytes of each part of the step, those as it begins included."""
        return {
            mark.name: max(self.live_bytes[max(0, mark.event - 1) : end], default=0)
            for mark, end in zip(self.marks, self._ends(), strict=True)
        }

    def _ends(self) -> list[int]:
        """Where each part of the step ends."""
        return [*(mark.event for mark in self.marks[1:]), self.num_events]

    def to_csv(self) -> str:
        """A line for each buffer, as ``docs/allocations.md`` says: id,lower,upper,size,kind,segment."""
        ends = dict(zip((mark.name for mark in self.marks), self._ends(), strict=True))
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("id", "lower", "upper", "size", "kind", "segment"))
        for number, a in enumerate(self.allocations):
            segment = a.segment if a.upper <= ends[a.segment] else ""
            writer.writerow((number, a.lower, a.upper, a.size_bytes, a.kind, segment))
        return text.getvalue()


@dataclass(frozen=True)
class Addresses:
    """Where the buffers of a step go: an offset in bytes for each, and where the highest ends.

    ``bound_bytes`` is proved: no addresses end lower. Both are padded to the device's alignment.
    """

    trace: AllocationTrace
    offsets: tuple[int, ...]
    height_bytes: int
    bound_bytes: int
