"""Calibrating one block: what it does, and what its forward and backward take in bytes and seconds, by running it."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch

from stowplan.core.program import BlockProgram, Op, Value
from stowplan.offload.arguments import flatten, map_tree, tensors_in
from stowplan.offload.copies import PlainCopies
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.intercept import Forward
from stowplan.offload.memory_log import Segment, memory_log, synchronize
from stowplan.offload.recording import Recording, record_call
from stowplan.offload.storages import storage_bytes
from stowplan.offload.tape.course import allowed_actions
from stowplan.offload.tape.proof import prove
from stowplan.offload.tape.run import Counters
from stowplan.offload.tape.tape import Origin, Tape, TapeOp

__all__ = ["BlockCapture", "Casts", "Passed", "Surroundings", "capture_block"]

Strides = Sequence[tuple[int, ...]]
GraphEnd = Callable[[Any], torch.Tensor | None]

_NUM_TIMED_RUNS = 3
_NUM_TIMED_REPLAYS = 2


class Passed:
    """In a block's output, the place of an argument that the block hands on as it is."""

    __slots__ = ("position",)

    def __init__(self, position: int) -> None:
        self.position = position  # among the flattened arguments


class Casts(Enum):
    """Who holds the copies of a block's weights that autocast caches: later calls of the block take the first one's."""

    OWN = "own"
    SHARED = "shared"  # this call makes them, others use them: moving them would save nothing
    THERE = "there"  # a call before made them and counts them


class Surroundings(NamedTuple):
    """What the rest of the model does with a call's inputs and outputs, by position.

    ``shared`` arguments are on the device during the call whatever it does: they are not its own. Of those, ``loose``
    ones are held by nobody afterwards, so that a replay that starts from them has to. ``held_outputs`` are held, and
    their bytes counted, by others.
    """

    shared: frozenset[int] = frozenset()
    loose: frozenset[int] = frozenset()
    held_outputs: frozenset[int] = frozenset()
    casts: Casts = Casts.OWN


@dataclass(slots=True)
class BlockCapture:
    """One block's tape and measurements. Bytes are above what was alive before the call, its input excluded."""

    tape: Tape
    name: str
    input_bytes: dict[int, int]  # of each storage among the arguments, by the position of its first tensor
    output_values: dict[int, int]  # value of each tensor that the call made and gives back, by position among them
    forward_seconds: float
    backward_seconds: float
    forward_peak_bytes: int
    backward_peak_bytes: int
    output_gradient_bytes: int
    gradient_bytes: int
    unseen_bytes: int  # alive after forward by the allocator, less those that the tape knows of
    lingering_bytes: int
    num_refuted: int  # ops whose replay did not give the same bits

    @property
    def held_bytes(self) -> int:
        """What autograd functions keep beside what they save."""
        return max(0, self.unseen_bytes)

    @property
    def saved_outputs(self) -> set[int]:
        """Positions of the outputs that the block itself saves, too."""
        saved = {slot.value for slot in self.tape.slots}
        return {position for position, value in self.output_values.items() if value in saved}

    def program(self, around: Surroundings) -> BlockProgram:
        """The program of a call with such surroundings."""
        own = {position: size for position, size in self.input_bytes.items() if position not in around.shared}
        saved = {self.tape.values[slot.value].position for slot in self.tape.slots}
        values, ops = _single_assignment(self.tape, around, {self.output_values[p] for p in around.held_outputs})
        lingering_bytes, there_bytes = self.lingering_bytes, 0
        if around.casts is Casts.THERE:
            there_bytes = sum(value.size_bytes for value in self.tape.values if value.lingers)
            lingering_bytes = 0
        return BlockProgram(
            name=self.name,
            values=values,
            ops=ops,
            forward_seconds=self.forward_seconds,
            backward_seconds=self.backward_seconds,
            forward_peak_bytes=self.forward_peak_bytes + sum(own.values()) - there_bytes,
            backward_peak_bytes=self.backward_peak_bytes
            + sum(size for p, size in own.items() if p in saved)
            - there_bytes,
            output_gradient_bytes=self.output_gradient_bytes,
            gradient_bytes=self.gradient_bytes,
            held_bytes=self.held_bytes,
            lingering_bytes=lingering_bytes,
        )


def capture_block(
    module: torch.nn.Module,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    held_gradients: bool,
    device: torch.device,
    gradient_strides: Strides | None = None,
) -> tuple[BlockCapture, Any]:
    """Record, prove and measure one call; gives the capture and the call's output.

    ``gradient_strides`` are those that the gradients of the call's outputs will have, where they are not the outputs'
    own: kernels choose their ways, and their scratch memory, by them.

    Gradients of the module's parameters must be None on entry (or zeros, with ``held_gradients``) and are so on exit.
    """

    def call() -> Any:
        own_args, own_kwargs = _own_arguments(args), _own_arguments(kwargs)
        torch.clear_autocast_cache()
        return _without_arguments(forward(*own_args, **own_kwargs), flatten(own_args, own_kwargs))

    recording = record_call(
        module, forward, _own_arguments(args), _own_arguments(kwargs), PlainCopies(HostSlab(1)), Counters()
    )
    tape = recording.recorder.tape
    output_values = _output_values(recording)
    num_refuted = _prove_and_time(tape, recording, device) if tape.steady else 0
    alive_bytes, lingering_bytes = _find_holders(recording)
    recording.recorder.finish()

    end = functools.partial(_graph_end, strides=gradient_strides)
    segments, output = _measure_memory(call, end, device)
    times = [_measure_times(call, end, module, device, held_gradients) for _ in range(_NUM_TIMED_RUNS)]
    leaves = flatten(args, kwargs)
    graph = segments["graph"]
    capture = BlockCapture(
        tape=tape,
        name=type(module).__name__,
        input_bytes=_input_bytes(leaves),
        output_values=output_values,
        forward_seconds=statistics.median(forward_seconds for forward_seconds, _ in times),
        backward_seconds=statistics.median(backward_seconds for _, backward_seconds in times),
        forward_peak_bytes=segments["forward"].peak_bytes - segments["forward"].start_bytes,
        backward_peak_bytes=segments["backward"].peak_bytes - segments["forward"].start_bytes,
        output_gradient_bytes=_output_gradient_bytes(output, gradient_strides),
        gradient_bytes=0 if held_gradients else _gradient_bytes(module),
        unseen_bytes=graph.start_bytes - segments["forward"].start_bytes - alive_bytes,
        lingering_bytes=lingering_bytes,
        num_refuted=num_refuted,
    )
    _clear_gradients(module, held_gradients)
    torch.clear_autocast_cache()
    return capture, output


class _Entry(torch.autograd.Function):
    """Where a block's graph begins: an argument that is no leaf, as autocast would take a leaf for a weight."""

    @staticmethod
    def forward(ctx: Any, argument: torch.Tensor) -> torch.Tensor:
        return argument.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        """Nobody asks for the argument's gradient."""


def _own_arguments(tree: Any) -> Any:
    """The same arguments cut off from the graph around the block; unknown objects (caches) are copied."""
    twins: dict[int, torch.Tensor] = {}  # an argument that is given twice is one tensor again

    def own(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in twins:
                twins[id(leaf)] = leaf.detach()
                if leaf.requires_grad:
                    twins[id(leaf)] = _Entry.apply(leaf.detach().requires_grad_())  # type: ignore[no-untyped-call]
            return twins[id(leaf)]
        if leaf is None or isinstance(leaf, bool | int | float | str):
            return leaf
        return copy.deepcopy(leaf)

    return map_tree(tree, own)


def _without_arguments(output: Any, leaves: list[Any]) -> Any:
    """The output with ``Passed`` in the places of tensors that are arguments of the call."""
    positions = {id(leaf): i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    return map_tree(output, lambda leaf: Passed(positions[id(leaf)]) if id(leaf) in positions else leaf)


def _input_bytes(leaves: list[Any]) -> dict[int, int]:
    """Bytes of each storage among the arguments, by the position of its first tensor."""
    storages: dict[int, tuple[int, int]] = {}
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            storages.setdefault(storage._cdata, (position, storage.nbytes()))
    return dict(storages.values())


def _output_values(recording: Recording) -> dict[int, int]:
    """Values of the tensors that the call made and gives back, by their position among those."""
    values = {position: recording.recorder.value_of(t) for position, t in enumerate(tensors_in(recording.output))}
    made = {p: v for p, v in values.items() if v is not None}
    return {p: v for p, v in made.items() if recording.recorder.tape.values[v].origin is Origin.MADE}


# ---- the tape: proof, time and scratch of every op -----------------------------------------------------------------
def _prove_and_time(tape: Tape, recording: Recording, device: torch.device) -> int:
    """Replay against the true values, then time every op and find its scratch memory; gives the number refuted."""
    truth = recording.truth()
    before = sum(op.replayable for op in tape.ops)
    prove(tape, recording.given, truth, recording.position)
    seconds: dict[int, list[float]] = {}

    @contextmanager
    def timed(op: int) -> Iterator[None]:
        synchronize(device)
        start = time.perf_counter()
        yield
        synchronize(device)
        seconds.setdefault(op, []).append(time.perf_counter() - start)

    for _ in range(_NUM_TIMED_REPLAYS):
        prove(tape, recording.given, truth, recording.position, timed)
    with memory_log(device) as log:

        @contextmanager
        def marked(op: int) -> Iterator[None]:
            log.mark(str(op))
            yield
            log.mark("between")

        prove(tape, recording.given, truth, recording.position, marked)
    scratch = {int(s.name): s.peak_bytes - s.end_bytes for s in log.segments if s.name.isdigit()}
    for number, op in enumerate(tape.ops):
        op.seconds = min(seconds.get(number, [0.0]))
        op.workspace_bytes = scratch.get(number, 0)
    return before - sum(op.replayable for op in tape.ops)


def _find_holders(recording: Recording) -> tuple[int, int]:
    """Find out who else keeps values alive; gives the bytes alive at the end of forward, and the unsaved that linger.

    What lives on after the graph and the output are gone is held by autocast's cache until the forward pass ends
    (it lingers), or by somebody else for longer, such as a key-value cache (it is pinned: moving it saves nothing).
    """
    recorder, tape = recording.recorder, recording.recorder.tape
    made = {number for number, value in enumerate(tape.values) if value.origin is Origin.MADE}
    alive_bytes = sum(tape.values[v].size_bytes for v in recorder.alive() & made)
    recording.run.drop_all()  # a cache may hold the graph, but does not need what the graph saved
    recording.output = None
    beyond = recorder.alive() & made
    torch.clear_autocast_cache()
    pinned = recorder.alive() & made
    for value in pinned:
        tape.values[value].pinned = True
    for value in beyond - pinned:
        tape.values[value].lingers = True
    unsaved = beyond - pinned - set(tape.saved_versions())
    return alive_bytes, sum(tape.values[v].size_bytes for v in unsaved)


# ---- the block: bytes and seconds ----------------------------------------------------------------------------------
class _Detour(torch.autograd.Function):
    """Stands for the rest of the model: takes the block's outputs, lets go of them, and has a gradient for each."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return gradients[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gradients = list(ctx.gradients)
        ctx.gradients.clear()
        return None, *gradients


def _graph_end(output: Any, strides: Strides | None) -> torch.Tensor | None:
    """A scalar whose backward gives every differentiable output a random gradient, without keeping the output.

    None for a frozen block, which has no backward.
    """
    outputs = [t for t in tensors_in(output) if t.requires_grad]
    if not outputs:
        return None
    if strides is None:
        strides = [t.stride() for t in outputs]
    gradients = [_random(t, stride) for t, stride in zip(outputs, strides, strict=True)]
    end: torch.Tensor = _Detour.apply(gradients, *outputs)  # type: ignore[no-untyped-call]
    return end


def _random(like: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    numbers = torch.randn(_reach(like.shape, stride), dtype=like.dtype, device=like.device)
    return numbers.as_strided(like.shape, stride)


def _reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements of a storage that a tensor of that shape and stride spans."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


def _output_gradient_bytes(output: Any, strides: Strides | None) -> int:
    outputs = [t for t in tensors_in(output) if t.requires_grad]
    if strides is None:
        strides = [t.stride() for t in outputs]
    return sum(t.element_size() * _reach(t.shape, stride) for t, stride in zip(outputs, strides, strict=True))


def _measure_memory(
    call: Callable[[], Any], graph_end: GraphEnd, device: torch.device
) -> tuple[dict[str, Segment], Any]:
    """Peaks of one forward and backward, by phase; gives the output (without its graph) too."""
    with memory_log(device) as log:
        log.mark("forward")
        output = call()
        log.mark("graph")
        end = graph_end(output)
        template = _detached(output)
        del output
        torch.clear_autocast_cache()
        log.mark("backward")
        _backward(end, device)
        del end
        log.mark("end")
    return {segment.name: segment for segment in log.segments}, template


def _detached(tree: Any) -> Any:
    """The shape of an output: tensors on the meta device, everything else as it is."""

    def detached(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return torch.empty_like(leaf, device="meta").requires_grad_(leaf.requires_grad)
        return leaf

    return map_tree(tree, detached)


def _measure_times(
    call: Callable[[], Any], graph_end: GraphEnd, module: torch.nn.Module, device: torch.device, held_gradients: bool
) -> tuple[float, float]:
    """Seconds of one forward and of its backward."""
    _clear_gradients(module, held_gradients)
    synchronize(device)
    start = time.perf_counter()
    output = call()
    synchronize(device)
    middle = time.perf_counter()
    end = graph_end(output)
    del output
    synchronize(device)
    second = time.perf_counter()
    _backward(end, device)
    synchronize(device)
    return middle - start, time.perf_counter() - second


def _backward(end: torch.Tensor | None, device: torch.device) -> None:
    if end is None:
        return
    with torch.autocast(device.type, enabled=False):
        end.backward()


def _gradient_bytes(module: torch.nn.Module) -> int:
    return storage_bytes(p.grad for p in module.parameters())


def _clear_gradients(module: torch.nn.Module, held_gradients: bool) -> None:
    for parameter in module.parameters():
        if held_gradients and parameter.grad is not None:
            parameter.grad.zero_()
        else:
            parameter.grad = None


# ---- the tape as a core program ------------------------------------------------------------------------------------
def _single_assignment(
    tape: Tape, around: Surroundings, held: Collection[int]
) -> tuple[tuple[Value, ...], tuple[Op, ...]]:
    """Values and ops for the planner: parameters and shared inputs left out, a value's versions told apart.

    ``held`` values count no bytes here and stay where they are: others hold them.
    """
    absent = around.shared - around.loose
    allowed = allowed_actions(tape)
    numbers: dict[tuple[int, int], int] = {}
    values: list[Value] = []
    for number, value in enumerate(tape.values):
        is_input = value.origin is Origin.INPUT and value.position not in absent
        if value.origin is not Origin.MADE and not is_input:
            continue
        if value.lingers and around.casts is Casts.THERE:
            continue
        for version, writer in enumerate(value.writers):
            last = version == value.last_version
            actions = allowed.get(number, ()) if last else ()
            if number in held or (value.lingers and around.casts is Casts.SHARED):
                actions = actions[:1]
            numbers[number, version] = len(values)
            values.append(
                Value(
                    name=value.name if last else f"{value.name}@{version}",
                    size_bytes=value.size_bytes if last and number not in held else 0,
                    producer=writer,
                    actions=actions,
                    shape=value.geometry.size,
                    dtype=str(value.geometry.dtype).removeprefix("torch."),
                    lingers=value.lingers,
                )
            )
    ops = tuple(_core_op(op, tape, numbers) for op in tape.ops)
    return tuple(values), ops


def _core_op(op: TapeOp, tape: Tape, numbers: dict[tuple[int, int], int]) -> Op:
    makes = [(value, 0) for _, value in op.makes]
    return Op(
        name=op.func._schema.name,
        inputs=tuple(dict.fromkeys(numbers[key] for key in op.reads if key in numbers)),
        outputs=tuple(numbers[key] for key in (*makes, *op.writes) if key in numbers),
        seconds=op.seconds,
        flops=op.flops,
        workspace_bytes=op.workspace_bytes,
        replayable=op.replayable and not any(tape.values[value].opaque for value, _ in makes),
        causal_attention="scaled_dot_product" in op.func._schema.name and _is_causal(op),
    )


def _is_causal(op: TapeOp) -> bool:
    for position, argument in enumerate(op.func._schema.arguments):
        if argument.name == "is_causal":
            return bool(op.kwargs.get("is_causal", op.args[position] if position < len(op.args) else False))
    return False
