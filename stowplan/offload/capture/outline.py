"""The model around its blocks: a forward and backward in which blocks hand on tensors of the right shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from stowplan.core.errors import UnsupportedModel
from stowplan.offload.allocation_record import AllocationRecord, Segment
from stowplan.offload.arguments import flatten, signature, tensors_in
from stowplan.offload.blocks import Block, likeness
from stowplan.offload.capture.block_capture import BlockCapture, capture_block
from stowplan.offload.capture.block_program import Casts, Surroundings
from stowplan.offload.capture.instruments import Instruments
from stowplan.offload.capture.stand_in import stand_in
from stowplan.offload.intercept import Forward, Interception
from stowplan.offload.tape.proof import Tolerance

__all__ = [
    "EMBEDDING_FORWARD",
    "END",
    "Call",
    "Moment",
    "Outline",
    "after",
    "argument",
    "before",
    "given_back",
    "handed_on",
    "output_gradient",
    "output_of",
]

EMBEDDING_FORWARD, END = "embedding forward", "end"
# Marks the kind of a call whose backward adds to gradients that are there already.
ADDING = "adding"


def before(call: int) -> str:
    """The mark where call number ``call`` begins."""
    return f"call {call}"


def handed_on(call: int) -> str:
    """The mark where that call has given its output: what follows is up to the next call, or the head."""
    return f"output {call}"


def given_back(call: int) -> str:
    """The mark where the gradient of that call's output arrives."""
    return f"gradient {call}"


def after(call: int) -> str:
    """The mark where its backward is over: what follows is up to the next backward, or to the embedding's end."""
    return f"backward {call}"


def argument(call: int) -> str:
    """How the log's notes on the arguments of call number ``call`` begin."""
    return f"argument of {call}"


def output_of(call: int) -> str:
    """How those on its outputs begin."""
    return f"output of {call}"


def output_gradient(call: int) -> str:
    """How those on the gradients of its outputs begin."""
    return f"gradient of {call}"


@dataclass(slots=True)
class Call:
    """One call of a block: which, of what kind, and the storages of its tensor arguments and outputs by position."""

    block: int
    kind: Any
    storages: dict[int, StorageWeakRef]
    outputs: dict[int, StorageWeakRef]
    held_outside: set[int] = field(default_factory=set)  # arguments that others still held when backward reached it
    gradient_strides: tuple[tuple[int, ...], ...] | None = None  # of its outputs, where they are not the outputs' own

    def own_bytes(self, shared: Collection[int], sizes: Mapping[int, int], alive_only: bool = False) -> int:
        """Bytes of the arguments that are the call's own; ``alive_only``: of those that are still there."""
        return sum(
            size
            for position, size in sizes.items()
            if position not in shared and not (alive_only and self.storages[position].expired())
        )


@dataclass(slots=True)
class Moment:
    """A part of the model outside the blocks, measured. ``earlier_bytes``: inputs of calls before that are alive."""

    segment: Segment
    seconds: float
    earlier_bytes: int


@dataclass
class Outline:
    """Runs a model with its blocks stood in for.

    ``explore`` captures each kind of block at its first call and learns the order of calls; ``measure`` then measures
    what is around the blocks. No more than one block's activations are alive at a time.
    """

    blocks: Sequence[Block]
    instruments: Instruments
    hold_gradients: bool
    hold_output: bool
    static: frozenset[int]  # storages that are alive all step: parameters, buffers, the batch
    on_progress: Callable[[str], None]
    tolerance: Tolerance | None = None  # of rows that are recomputed alone; None: none
    captures: dict[Any, BlockCapture] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    _templates: dict[Any, Any] = field(default_factory=dict)
    record: AllocationRecord | None = None  # of the last measurement, if asked for
    _mark: Callable[[str], None] = lambda name: None
    _note: Callable[[str, torch.Tensor], None] = lambda name, tensor: None
    _shared: list[frozenset[int]] = field(default_factory=list)
    _strides: list[tuple[tuple[int, ...], ...] | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._anchor = torch.zeros((), device=self.instruments.device, requires_grad=True)

    def explore(self, forward: Callable[[], Any], loss_of: Callable[[Any], torch.Tensor]) -> None:
        """Fill ``captures`` and ``calls``. Raises UnsupportedModel if none of the blocks is called."""
        with self._standing_in():
            self._run(forward, loss_of)
            self._strides = [call.gradient_strides for call in self.calls]
            if any(strides is not None for strides in self._strides):  # known only now: once more, with them
                self.calls = []
                self._run(forward, loss_of)
        if not self.calls:
            raise UnsupportedModel("the forward pass calls none of the blocks; name those that it calls with blocks=.")
        self._find_additions()
        used = {call.kind for call in self.calls}
        self.captures = {kind: capture for kind, capture in self.captures.items() if kind in used}
        self._shared = [self.shared_positions(number) for number in range(len(self.calls))]

    def _find_additions(self) -> None:
        """All but the last call of a block add to gradients that the last one, the first in backward, has made."""
        met: set[int] = set()
        for call in reversed(self.calls):
            again = (*call.kind, ADDING)
            if call.block in met and again in self.captures:
                call.kind = again
            met.add(call.block)

    def measure(self, forward: Callable[[], Any], loss_of: Callable[[Any], torch.Tensor]) -> dict[str, Moment]:
        """Bytes and seconds of the parts outside the blocks, by the marks at which they begin."""
        order = [call.block for call in self.calls]
        self.calls = []
        times: list[float] = []
        earlier: list[int] = []
        with self._standing_in(), self.instruments.memory_log() as log:

            def mark(name: str) -> None:
                times.append(self.instruments.seconds())
                earlier.append(self._earlier_bytes() if name.startswith("call") else 0)
                log.mark(name)

            self._mark, self._note = mark, log.note
            self._run(forward, loss_of)
            mark(END)
            times.append(times[-1])
        self._mark, self._note = lambda name: None, lambda name, tensor: None
        self.record = log.record if self.instruments.allocations else None
        if [call.block for call in self.calls] != order:
            raise UnsupportedModel(
                "the model called its blocks in another order in its second forward pass on the same batch; blocks "
                "that are skipped at random (layer drop) are not supported yet: turn that off."
            )
        self._find_additions()
        segments = [segment for segment in log.segments if segment.name != "start"]
        return {
            segment.name: Moment(segment, (end - start) * self.instruments.scale, num_bytes)
            for segment, start, end, num_bytes in zip(segments, times, times[1:], earlier, strict=False)
        }

    def loss(self, forward: Callable[[], Any], loss_of: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """The loss of one more forward pass, blocks stood in for; what is known of the calls stays as it is."""
        calls, self.calls = self.calls, []
        torch.clear_autocast_cache()
        try:
            with self._standing_in():
                return loss_of(forward())
        finally:
            torch.clear_autocast_cache()
            self.calls = calls

    def _earlier_bytes(self) -> int:
        """Bytes of the calls' own arguments that somebody else keeps until the forward pass ends.

        They count where the call is, not outside: a model's own name for its embeddings is the usual case.
        """
        return sum(
            call.own_bytes(self._shared[number], self.captures[call.kind].input_bytes, alive_only=True)
            for number, call in enumerate(self.calls)
        )

    def _run(self, forward: Callable[[], Any], loss_of: Callable[[Any], torch.Tensor]) -> None:
        """One forward and backward of the model."""
        torch.clear_autocast_cache()
        self._mark(EMBEDDING_FORWARD)
        output = forward()
        loss = loss_of(output)
        if not self.hold_output:
            del output
        torch.clear_autocast_cache()
        if self.calls:
            with torch.autocast(self.instruments.device.type, enabled=False):
                loss.backward()

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        interceptions = [Interception(block.module, self._handler(i)) for i, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            for interception in interceptions:
                interception.remove()

    def _handler(self, number: int) -> Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]:
        def call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._call(number, forward, args, kwargs)

        return call

    def _call(self, block: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.blocks[block].module
        number = len(self.calls)
        self._mark(before(number))
        leaves = flatten(args, kwargs)
        strides = self._strides[number] if number < len(self._strides) else None
        kind = (likeness(module), signature(leaves, kwargs), strides)
        if kind not in self.captures:
            self.on_progress(f"measuring {self.blocks[block].name} ({type(module).__name__})")
            self.captures[kind], self._templates[kind] = capture_block(
                module, forward, args, kwargs, self.hold_gradients, self.instruments, strides, self.tolerance
            )
        again = (*kind, ADDING)
        repeated = any(call.block == block for call in self.calls)
        if repeated and not self.hold_gradients and again not in self.captures:
            with _zero_gradients(module):
                self.captures[again], _ = capture_block(
                    module, forward, args, kwargs, True, self.instruments, strides, self.tolerance
                )
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        storages = {i: StorageWeakRef(tensor.untyped_storage()) for i, tensor in tensors.items()}
        call = Call(block, kind, storages, {})
        # A block's graph keeps the shared arguments that it saves (masks, rotary tables); so must what stands for it.
        shared = self._shared[number] if number < len(self._shared) else frozenset()
        for position, tensor in tensors.items():
            self._note(f"{argument(number)} {position}", tensor)
        held = [tensors[position] for position in shared & self._saved_positions(kind)]

        def on_backward(gradients: Sequence[torch.Tensor]) -> None:
            self._mark(given_back(number))
            for position, gradient in enumerate(gradients):
                self._note(f"{output_gradient(number)} {position}", gradient)
            if any(g.stride() != out.stride() for g, out in zip(gradients, outputs, strict=True)):
                call.gradient_strides = tuple(g.stride() for g in gradients)
            held.clear()
            call.held_outside = {p for p, storage in storages.items() if not storage.expired()}
            self._mark(after(number))

        outputs = [tensor for tensor in tensors_in(self._templates[kind]) if tensor.requires_grad]
        output = stand_in(self._templates[kind], leaves, self._anchor, on_backward)
        call.outputs = {i: StorageWeakRef(t.untyped_storage()) for i, t in enumerate(tensors_in(output))}
        for position, leaf in enumerate(flatten((output,), {})):
            if isinstance(leaf, torch.Tensor):
                self._note(f"{output_of(number)} {position}", leaf)
        self.calls.append(call)
        self._mark(handed_on(number))
        return output

    def surroundings(self, number: int) -> Surroundings:
        """What the rest of the model does with a call's inputs and outputs."""
        call, kinds = self.calls[number], [other.kind for other in self.calls]
        kept = {
            other.storages[position].cdata
            for other in self.calls
            for position in self._saved_positions(other.kind) & other.storages.keys()
        }
        shared = self.shared_positions(number)
        loose = {
            position
            for position in shared - call.held_outside
            if call.storages[position].cdata not in kept | self.static
        }
        taken = {
            other.storages[position].cdata
            for other, positions in zip(self.calls, map(self.shared_positions, range(len(kinds))), strict=True)
            for position in positions
        }
        made = self.captures[call.kind].output_values
        held_outputs = {i for i, storage in call.outputs.items() if i in made and storage.cdata in taken}
        casts = Casts.OWN
        if any(other.block == call.block for other in self.calls[:number]):
            casts = Casts.THERE
        elif any(other.block == call.block for other in self.calls[number + 1 :]):
            casts = Casts.SHARED
        return Surroundings(shared, frozenset(loose), frozenset(held_outputs), casts)

    def shared_positions(self, number: int) -> frozenset[int]:
        """The arguments of a call (by position) that are no values of its own, because they are alive whatever it does.

        Other calls were given the same storage, the call that made it saves it, what is outside the blocks holds it
        until backward, or it is there all step.
        """
        call = self.calls[number]
        givers = Counter(key for other in self.calls for key in {s.cdata for s in other.storages.values()})
        saved = {
            other.outputs[position].cdata
            for other in self.calls
            for position in self.captures[other.kind].saved_outputs
        }
        return frozenset(
            position
            for position, storage in call.storages.items()
            if givers[storage.cdata] > 1
            or storage.cdata in saved
            or storage.cdata in self.static
            or position in call.held_outside
        )

    def _saved_positions(self, kind: Any) -> set[int]:
        tape = self.captures[kind].tape
        return {tape.values[slot.value].position for slot in tape.slots}


@contextmanager
def _zero_gradients(module: torch.nn.Module) -> Iterator[None]:
    """The gradients of a backward before: zeros while this is open, none afterwards."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.grad = None
