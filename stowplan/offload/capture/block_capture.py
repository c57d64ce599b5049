"""Calibrating one block: what it does, and what its forward and backward take in bytes and seconds, by running it."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from stowplan.core.program import BlockProgram
from stowplan.offload.allocation_record import AllocationRecord, Segment
from stowplan.offload.arguments import flatten, map_tree, tensors_in
from stowplan.offload.capture.block_allocations import (
    INPUT_GRADIENT,
    OUTPUT_GRADIENT,
    SeenAllocations,
    in_turn,
    note_output,
    saved_noted,
    seen_allocations,
)
from stowplan.offload.capture.block_program import Casts, Surroundings, single_assignment
from stowplan.offload.capture.graph_end import GraphEnd, Strides, graph_end, output_gradient_bytes
from stowplan.offload.capture.instruments import Instruments
from stowplan.offload.capture.own_arguments import (
    OnGradient,
    input_bytes,
    own_arguments,
    unnoted,
    without_arguments,
)
from stowplan.offload.copies import PlainCopies
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.intercept import Forward
from stowplan.offload.parallel import class_name, num_processes
from stowplan.offload.recording import Recording, record_call
from stowplan.offload.storages import storage_bytes
from stowplan.offload.tape.proof import RowTrials, Tolerance, prove
from stowplan.offload.tape.rows import grid, num_tokens, row_wise
from stowplan.offload.tape.run import Counters
from stowplan.offload.tape.tape import Origin, Tape

__all__ = ["BlockCapture", "capture_block", "median_seconds"]

# A machine is disturbed for tenths of a second at a time: a median over less than that is one of the disturbance.
_LEAST_TIMED_RUNS, _MOST_TIMED_RUNS, _ENOUGH_SECONDS = 3, 20, 0.5
_NUM_TIMED_REPLAYS = 2


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
    allocations: SeenAllocations | None  # if asked for

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
        values, ops = single_assignment(self.tape, around, {self.output_values[p] for p in around.held_outputs})
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
            allocations=self.allocations.of(self.tape, values, around) if self.allocations is not None else None,
        )


def capture_block(
    module: torch.nn.Module,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    held_gradients: bool,
    instruments: Instruments,
    gradient_strides: Strides | None = None,
    tolerance: Tolerance | None = None,
) -> tuple[BlockCapture, Any]:
    """Record, prove and measure one call; gives the capture and the call's output. A dry call is not proved.

    First rows made alone must have the bits that they have in the whole, or be within ``tolerance``, to be planned.

    ``gradient_strides`` are those that the gradients of the call's outputs will have, where they are not the outputs'
    own: kernels choose their ways, and their scratch memory, by them.

    Gradients of the module's parameters must be None on entry (or zeros, with ``held_gradients``) and are so on exit.
    """

    def call(on_gradient: OnGradient = unnoted) -> Any:
        own_args, own_kwargs = own_arguments(args, on_gradient), own_arguments(kwargs, on_gradient)
        torch.clear_autocast_cache()
        return without_arguments(forward(*own_args, **own_kwargs), flatten(own_args, own_kwargs))

    own_args, own_kwargs = own_arguments(args), own_arguments(kwargs)
    copies = PlainCopies(HostSlab(1))
    recording = record_call(module, forward, own_args, own_kwargs, copies, Counters(), observe=instruments.observe)
    del own_args, own_kwargs
    tape = recording.recorder.tape
    output_values = _output_values(recording)
    num_refuted = _prove_and_time(tape, recording, instruments, tolerance) if tape.steady and not instruments.dry else 0
    alive_bytes, lingering_bytes = _find_holders(recording)
    recording.recorder.finish()

    end = functools.partial(graph_end, strides=gradient_strides)
    segments, output, record = _measure_memory(call, end, instruments)
    estimate = median_seconds(call, end, module, instruments, held_gradients)
    seconds = instruments.block_seconds(module, args, kwargs, estimate)
    for op in tape.ops if instruments.dry else ():
        op.seconds *= instruments.scale
    leaves = flatten(args, kwargs)
    graph = segments["graph"]
    capture = BlockCapture(
        tape=tape,
        name=class_name(module),
        input_bytes=input_bytes(leaves),
        output_values=output_values,
        forward_seconds=seconds[0],
        backward_seconds=seconds[1],
        forward_peak_bytes=segments["forward"].peak_bytes - segments["forward"].start_bytes,
        backward_peak_bytes=segments["backward"].peak_bytes - segments["forward"].start_bytes,
        output_gradient_bytes=output_gradient_bytes(output, gradient_strides),
        gradient_bytes=0 if held_gradients else _gradient_bytes(module),
        unseen_bytes=graph.start_bytes - segments["forward"].start_bytes - alive_bytes,
        lingering_bytes=lingering_bytes,
        num_refuted=num_refuted,
        allocations=seen_allocations(record, tape) if record is not None else None,
    )
    _clear_gradients(module, held_gradients)
    torch.clear_autocast_cache()
    return capture, output


def _output_values(recording: Recording) -> dict[int, int]:
    """Values of the tensors that the call made and gives back, by their position among those."""
    values = {position: recording.recorder.value_of(t) for position, t in enumerate(tensors_in(recording.output))}
    made = {p: v for p, v in values.items() if v is not None}
    return {p: v for p, v in made.items() if recording.recorder.tape.values[v].origin is Origin.MADE}


# ---- the tape: proof, time and scratch of every op -----------------------------------------------------------------
def _prove_and_time(tape: Tape, recording: Recording, instruments: Instruments, tolerance: Tolerance | None) -> int:
    """Replay against the true values, then time every op and find its scratch memory; gives the number refuted."""
    truth = recording.truth()
    before = sum(op.replayable for op in tape.ops)
    num_rows = num_tokens(tape)
    rules = row_wise(tape, num_rows)
    points = dict.fromkeys(rules, grid(num_rows, instruments.device))
    trials = RowTrials(num_rows, rules, points, tolerance)
    prove(tape, recording.given, truth, recording.position, trials=trials)
    seconds: dict[int, list[float]] = {}

    @contextmanager
    def timed(op: int) -> Iterator[None]:
        start = instruments.seconds()
        yield
        seconds.setdefault(op, []).append(instruments.seconds() - start)

    for _ in range(_NUM_TIMED_REPLAYS):
        prove(tape, recording.given, truth, recording.position, timed)
    with instruments.memory_log() as log:

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
def _measure_memory(
    call: Callable[[OnGradient], Any], make_end: GraphEnd, instruments: Instruments
) -> tuple[dict[str, Segment], Any, AllocationRecord | None]:
    """Peaks of one forward and backward, by phase; gives the output (without its graph) and requests, too."""
    with instruments.memory_log() as log:
        log.mark("forward")
        with saved_noted(log) if instruments.allocations else nullcontext():
            output = call(in_turn(log, INPUT_GRADIENT))
        note_output(log, output)
        log.mark("graph")
        end = make_end(output, in_turn(log, OUTPUT_GRADIENT))
        template = _detached(output)
        del output
        torch.clear_autocast_cache()
        log.mark("backward")
        _backward(end, instruments.device)
        del end
        log.mark("end")
    record = log.record if instruments.allocations else None
    return {segment.name: segment for segment in log.segments}, template, record


def _detached(tree: Any) -> Any:
    """The shape of an output: tensors on the meta device, everything else as it is."""

    def detached(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return torch.empty_like(leaf, device="meta").requires_grad_(leaf.requires_grad)
        return leaf

    return map_tree(tree, detached)


def median_seconds(
    call: Callable[[], Any],
    make_end: GraphEnd,
    module: torch.nn.Module,
    instruments: Instruments,
    held_gradients: bool,
) -> tuple[float, float]:
    """Seconds of a forward and of its backward, over several runs; a dry run is always the same.

    How many runs there are must not depend on this process's clock where others may wait in a block's collectives.
    """
    times: list[tuple[float, float]] = []
    most = _LEAST_TIMED_RUNS if num_processes() > 1 else _MOST_TIMED_RUNS
    while len(times) < _LEAST_TIMED_RUNS or (len(times) < most and sum(map(sum, times)) < _ENOUGH_SECONDS):
        times.append(_measure_seconds(call, make_end, module, instruments, held_gradients))
        if instruments.dry:
            break
    forward_seconds, backward_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    return forward_seconds, backward_seconds


def _measure_seconds(
    call: Callable[[], Any],
    make_end: GraphEnd,
    module: torch.nn.Module,
    instruments: Instruments,
    held_gradients: bool,
) -> tuple[float, float]:
    _clear_gradients(module, held_gradients)
    start = instruments.seconds()
    output = call()
    middle = instruments.seconds()
    end = make_end(output, unnoted)
    del output
    second = instruments.seconds()
    _backward(end, instruments.device)
    return middle - start, instruments.seconds() - second


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
