"""The requests of memory of one block's forward and backward, and which of them are what the block saves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from stowplan.core.allocations import BlockAllocations, Events, Place, num_buffers
from stowplan.core.program import Value
from stowplan.offload.allocation_record import AllocationRecord
from stowplan.offload.arguments import flatten
from stowplan.offload.capture.block_program import Casts, Surroundings
from stowplan.offload.memory_log import MemoryLog
from stowplan.offload.tape.tape import Origin, Tape

__all__ = [
    "INPUT_GRADIENT",
    "OUTPUT_GRADIENT",
    "SeenAllocations",
    "in_turn",
    "note_output",
    "saved_noted",
    "seen_allocations",
]

_SAVED, _OUTPUT = "saved", "output"
OUTPUT_GRADIENT, INPUT_GRADIENT = "output gradient", "input gradient"


@contextmanager
def saved_noted(log: MemoryLog) -> Iterator[None]:
    """Inside, every tensor that autograd saves is noted in its turn."""
    note = in_turn(log, _SAVED)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        note(tensor)
        return tensor.detach()  # itself would be held by the node that made it, in a circle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def in_turn(log: MemoryLog, name: str) -> Callable[[torch.Tensor], None]:
    """A function that notes tensors under ``name``, numbered in turn."""
    numbers = itertools.count()
    return lambda tensor: log.note(f"{name} {next(numbers)}", tensor)


def note_output(log: MemoryLog, output: Any) -> None:
    """Note a call's output, leaf by leaf."""
    for number, leaf in enumerate(flatten((output,), {})):
        if isinstance(leaf, torch.Tensor):
            log.note(f"{_OUTPUT} {number}", leaf)


@dataclass(frozen=True, slots=True)
class SeenAllocations:
    """What a log saw of one call, by values of the call's tape. Buffers are numbered as in ``BlockAllocations``."""

    forward: Events
    backward: Events
    saved: Mapping[int, int]  # buffer of each value
    lingering: tuple[int, ...]
    outputs: tuple[Place, ...]
    output_gradients: tuple[Place, ...]
    input_gradients: tuple[int, ...]

    def of(self, tape: Tape, values: Sequence[Value], around: Surroundings) -> BlockAllocations:
        """The allocations of a call with such surroundings, whose program has ``values``."""
        numbers = {value.name: number for number, value in enumerate(tape.values)}
        saved = [self.saved.get(numbers[value.name], -1) for value in values if value.saved]
        inputs = [
            Place(position=tape.values[numbers[value.name]].position, buffer=number)
            for number, value in enumerate(values)
            if value.producer is None and tape.values[numbers[value.name]].origin is Origin.INPUT
        ]
        found = BlockAllocations(
            forward=self.forward,
            backward=self.backward,
            saved=tuple(saved),
            lingering=self.lingering,
            arguments=tuple(inputs),
            outputs=self.outputs,
            output_gradients=self.output_gradients,
            input_gradients=self.input_gradients,
        )
        if around.casts is not Casts.THERE:
            return found
        lingering = {self.saved[v] for v, value in enumerate(tape.values) if value.lingers and v in self.saved}
        return _without(found, lingering | set(self.lingering))


def seen_allocations(record: AllocationRecord, tape: Tape) -> SeenAllocations:
    """What ``record`` has between its marks ``forward``, ``graph``, ``backward`` and ``end``."""
    forward, between, backward = (
        record.between(*marks) for marks in itertools.pairwise(("forward", "graph", "backward", "end"))
    )
    first = num_buffers(record.events[: record.marks["forward"]])
    num_forward, num_between = num_buffers(forward), num_buffers(between)
    gradients = record.noted(OUTPUT_GRADIENT)
    kept = sorted(set(gradients.values()))
    seen = list(range(first, first + num_forward)) + kept
    later = first + num_forward + num_between
    seen += range(later, later + num_buffers(backward))
    numbers = {buffer: number for number, buffer in enumerate(seen)}
    outputs = {place: numbers[buffer] for place, buffer in record.noted(_OUTPUT).items() if buffer in numbers}
    slots = record.noted(_SAVED)
    saved = {
        slot.value: numbers[slots[number]]
        for number, slot in enumerate(tape.slots)
        if slots.get(number) in numbers and tape.values[slot.value].origin is Origin.MADE
    }
    gone = {~event - first for event in between if event < 0 and first <= ~event < first + num_forward}
    return SeenAllocations(
        forward=_renumbered(forward, numbers),
        backward=_renumbered(backward, numbers),
        saved=saved,
        lingering=tuple(sorted(gone - set(outputs.values()))),
        outputs=_places(outputs),
        output_gradients=_places({place: numbers[buffer] for place, buffer in gradients.items()}),
        input_gradients=tuple(numbers[b] for b in record.noted(INPUT_GRADIENT).values() if b in numbers),
    )


def _places(buffers: Mapping[int, int]) -> tuple[Place, ...]:
    return tuple(Place(position=position, buffer=buffer) for position, buffer in sorted(buffers.items()))


def _renumbered(events: Events, numbers: Mapping[int, int]) -> Events:
    """Events with other numbers of buffers; those of buffers that have none are left out."""
    return tuple(event if event > 0 else ~numbers[~event] for event in events if event > 0 or ~event in numbers)


def _without(block: BlockAllocations, buffers: Collection[int]) -> BlockAllocations:
    """The same without some buffers that its forward allocates."""
    count = num_buffers(block.forward)
    left = [number for number in range(count) if number not in buffers]
    others = num_buffers(block.backward) + len({place.buffer for place in block.output_gradients})
    numbers = {old: new for new, old in enumerate([*left, *range(count, count + others)])}
    allocations = itertools.count()
    forward = tuple(event for event in block.forward if event < 0 or next(allocations) in numbers)

    def moved(places: tuple[Place, ...]) -> tuple[Place, ...]:
        return tuple(Place(position=p.position, buffer=numbers[p.buffer]) for p in places if p.buffer in numbers)

    return BlockAllocations(
        forward=_renumbered(forward, numbers),
        backward=_renumbered(block.backward, numbers),
        saved=tuple(numbers.get(buffer, -1) for buffer in block.saved),
        lingering=(),
        arguments=block.arguments,
        outputs=moved(block.outputs),
        output_gradients=moved(block.output_gradients),
        input_gradients=tuple(numbers[buffer] for buffer in block.input_gradients if buffer in numbers),
    )
