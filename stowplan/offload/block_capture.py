"""Calibrating one block: what it does, and what its forward and backward take in bytes and seconds, by running it."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from stowplan.core.program import BlockProgram, Op, Value
from stowplan.offload.arguments import flatten, tensors_in
from stowplan.offload.copies import PlainCopies
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.instruments import Instruments
from stowplan.offload.intercept import Forward
from stowplan.offload.memory_log import Segment
from stowplan.offload.recording import Recording, record_call
from stowplan.offload.storages import storage_bytes
from stowplan.offload.tape.course import allowed_actions
from stowplan.offload.tape.proof import prove
from stowplan.offload.tape.run import Counters
from stowplan.offload.tape.tape import Origin, Tape, TapeOp

__all__ = ["BlockCapture", "capture_block", "measure_seconds"]

_NUM_TIMED_RUNS = 3
_NUM_TIMED_REPLAYS = 2


@dataclass(slots=True)
class BlockCapture:
    """One block's tape and measurements. Bytes are above what was alive before the call, its input excluded."""

    tape: Tape
    name: str
    input_bytes: dict[int, int]  # storage size of each tensor argument, by its position among the leaves
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

    def program(self, shared: set[int]) -> BlockProgram:
        """The program, once it is known which arguments (by position) all blocks share: those are not its own."""
        own = {position: size for position, size in self.input_bytes.items() if position not in shared}
        saved = {self.tape.values[slot.value].position for slot in self.tape.slots}
        values, ops = _single_assignment(self.tape, set(own))
        return BlockProgram(
            name=self.name,
            values=values,
            ops=ops,
            forward_seconds=self.forward_seconds,
            backward_seconds=self.backward_seconds,
            forward_peak_bytes=self.forward_peak_bytes + sum(own.values()),
            backward_peak_bytes=self.backward_peak_bytes + sum(size for p, size in own.items() if p in saved),
            output_gradient_bytes=self.output_gradient_bytes,
            gradient_bytes=self.gradient_bytes,
            held_bytes=self.held_bytes,
            lingering_bytes=self.lingering_bytes,
        )


def capture_block(
    module: torch.nn.Module,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    held_gradients: bool,
    instruments: Instruments,
) -> tuple[BlockCapture, Any]:
    """Record, prove and measure one call; gives the capture and the call's output. A dry call is not proved.

    Gradients of the module's parameters must be None on entry (or zeros, with ``held_gradients``) and are so on exit.
    """

    def call() -> Any:
        own_args, own_kwargs = _own_arguments(args), _own_arguments(kwargs)
        torch.clear_autocast_cache()
        return forward(*own_args, **own_kwargs)

    own_args, own_kwargs = _own_arguments(args), _own_arguments(kwargs)
    copies = PlainCopies(HostSlab(1))
    recording = record_call(module, forward, own_args, own_kwargs, copies, Counters(), instruments.observe)
    tape = recording.recorder.tape
    num_refuted = _prove_and_time(tape, recording, instruments) if tape.steady and not instruments.dry else 0
    alive_bytes, lingering_bytes = _find_holders(recording)
    recording.recorder.finish()

    segments, output = _measure_memory(call, instruments)
    num_runs = 1 if instruments.dry else _NUM_TIMED_RUNS
    times = [measure_seconds(call, module, instruments, held_gradients) for _ in range(num_runs)]
    forward_seconds, backward_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    seconds = instruments.block_seconds(module, args, kwargs, (forward_seconds, backward_seconds))
    for op in tape.ops if instruments.dry else ():
        op.seconds *= instruments.scale
    leaves = flatten(args, kwargs)
    graph = segments["graph"]
    capture = BlockCapture(
        tape=tape,
        name=type(module).__name__,
        input_bytes={i: t.untyped_storage().nbytes() for i, t in enumerate(leaves) if isinstance(t, torch.Tensor)},
        forward_seconds=seconds[0],
        backward_seconds=seconds[1],
        forward_peak_bytes=segments["forward"].peak_bytes - segments["forward"].start_bytes,
        backward_peak_bytes=segments["backward"].peak_bytes - segments["forward"].start_bytes,
        output_gradient_bytes=sum(t.untyped_storage().nbytes() for t in tensors_in(output) if t.requires_grad),
        gradient_bytes=0 if held_gradients else _gradient_bytes(module),
        unseen_bytes=graph.start_bytes - segments["forward"].start_bytes - alive_bytes,
        lingering_bytes=lingering_bytes,
        num_refuted=num_refuted,
    )
    _clear_gradients(module, held_gradients)
    torch.clear_autocast_cache()
    return capture, output


def _own_arguments(tree: Any) -> Any:
    """The same arguments cut off from the graph around the block; unknown objects (caches) are copied."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().requires_grad_(tree.requires_grad)
    if isinstance(tree, dict):
        return {key: _own_arguments(item) for key, item in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)([_own_arguments(item) for item in tree])
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    return copy.deepcopy(tree)


# ---- the tape: proof, time and scratch of every op -----------------------------------------------------------------
def _prove_and_time(tape: Tape, recording: Recording, instruments: Instruments) -> int:
    """Replay against the true values, then time every op and find its scratch memory; gives the number refuted."""
    truth = recording.truth()
    before = sum(op.replayable for op in tape.ops)
    prove(tape, recording.given, truth, recording.position)
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


def _graph_end(output: Any) -> torch.Tensor | None:
    """A scalar whose backward gives every differentiable output a random gradient, without keeping the output.

    None for a frozen block, which has no backward.
    """
    outputs = [t for t in tensors_in(output) if t.requires_grad]
    if not outputs:
        return None
    end: torch.Tensor = _Detour.apply([torch.randn_like(t) for t in outputs], *outputs)  # type: ignore[no-untyped-call]
    return end


def _measure_memory(call: Callable[[], Any], instruments: Instruments) -> tuple[dict[str, Segment], Any]:
    """Peaks of one forward and backward, by phase; gives the output (without its graph) too."""
    with instruments.memory_log() as log:
        log.mark("forward")
        output = call()
        log.mark("graph")
        end = _graph_end(output)
        template = _detached(output)
        del output
        torch.clear_autocast_cache()
        log.mark("backward")
        _backward(end, instruments.device)
        del end
        log.mark("end")
    return {segment.name: segment for segment in log.segments}, template


def _detached(tree: Any) -> Any:
    """The shape of an output: tensors on the meta device, everything else as it is."""
    if isinstance(tree, torch.Tensor):
        return torch.empty_like(tree, device="meta").requires_grad_(tree.requires_grad)
    if isinstance(tree, tuple | list):
        return type(tree)([_detached(item) for item in tree])
    if isinstance(tree, dict):
        return {key: _detached(item) for key, item in tree.items()}
    return tree


def measure_seconds(
    call: Callable[[], Any], module: torch.nn.Module, instruments: Instruments, held_gradients: bool
) -> tuple[float, float]:
    """Seconds of one forward and of its backward."""
    _clear_gradients(module, held_gradients)
    start = instruments.seconds()
    output = call()
    middle = instruments.seconds()
    end = _graph_end(output)
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


# ---- the tape as a core program ------------------------------------------------------------------------------------
def _single_assignment(tape: Tape, own_inputs: set[int]) -> tuple[tuple[Value, ...], tuple[Op, ...]]:
    """Values and ops for the planner: parameters and shared inputs left out, a value's versions told apart."""
    allowed = allowed_actions(tape)
    numbers: dict[tuple[int, int], int] = {}
    values: list[Value] = []
    for number, value in enumerate(tape.values):
        is_input = value.origin is Origin.INPUT and value.position in own_inputs
        if value.origin is not Origin.MADE and not is_input:
            continue
        for version, writer in enumerate(value.writers):
            last = version == value.last_version
            actions = allowed.get(number, ()) if last else ()
            numbers[number, version] = len(values)
            values.append(
                Value(
                    name=value.name if last else f"{value.name}@{version}",
                    size_bytes=value.size_bytes if last else 0,
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
