"""One training step as a program: a real block of each kind, the rest of the model around stand-ins for the blocks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from stowplan.core.program import BlockProgram, Phase, StepProgram
from stowplan.core.units import format_bytes
from stowplan.offload.arguments import tensors_in
from stowplan.offload.blocks import Block, refuse_unsupported
from stowplan.offload.buffers import Buffers
from stowplan.offload.capture.instruments import Instruments, RealInstruments
from stowplan.offload.capture.optimizers import OptimizerCost, optimizer_cost, state_bytes
from stowplan.offload.capture.outline import Moment, Outline
from stowplan.offload.capture.outside import outside_allocations
from stowplan.offload.capture.phases import phases_of
from stowplan.offload.parallel import is_sharded
from stowplan.offload.recording import devices_of
from stowplan.offload.storages import storage_bytes
from stowplan.offload.tape.proof import Tolerance
from stowplan.offload.tape.rng import restored

__all__ = ["Capture", "capture"]


_NOTABLE_BYTES = 4096  # that the tape and the allocator may differ by without a word


class Capture(NamedTuple):
    """A captured step, and in words what it rests on.

    ``again`` captures what is outside the blocks once more. ``loss`` hands the loss of a forward pass to its argument,
    which may differentiate it, by parameters that stand for the model's own meanwhile. Both run with whatever the
    caller has changed outside the blocks by then; the programs of the blocks stay as they are.
    """

    step: StepProgram
    assumptions: tuple[str, ...]
    again: Callable[[], StepProgram]
    loss: Callable[[Callable[[torch.Tensor], None]], None]

    def with_buffers(self, num_bytes: int) -> Capture:
        """The same with more buffers, which somebody around the model holds all step."""

        def more(step: StepProgram) -> StepProgram:
            return replace(step, buffer_bytes=step.buffer_bytes + num_bytes)

        return self._replace(step=more(self.step), again=lambda: more(self.again()))


def capture(
    model: torch.nn.Module,
    blocks: Sequence[Block],
    forward: Callable[[], Any],
    loss_of: Callable[[Any], torch.Tensor],
    *,
    optimizer: torch.optim.Optimizer | None,
    batch: Any,
    instruments: Instruments | None = None,
    hold_gradients: bool = False,
    hold_output: bool = True,
    tolerance: Tolerance | None = None,
    on_progress: Callable[[str], None] = lambda message: None,
) -> Capture:
    """Run parts of one step of ``model`` and describe the whole of it.

    Parameters, gradients, buffers, optimizer and random generators are afterwards as they were before.

    Args:
        forward: calls the model on the batch and gives its output.
        loss_of: the loss to differentiate, from that output.
        optimizer: its steady states and its step are counted; None leaves them out.
        batch: the batch, whose tensors count as alive all step.
        instruments: what bytes and seconds are measured with; default: the model's device itself.
        hold_gradients: gradients are alive throughout the step (accumulation, ``set_to_none=False``).
        hold_output: the output is alive until backward is over.
        tolerance: what rows that are recomputed alone may differ by; None: by no bit.

    Raises:
        UnsupportedModel: compiled or self-checkpointing blocks, or none called.
    """
    refuse_unsupported(model, blocks)
    instruments = instruments or RealInstruments(next(model.parameters()).device)
    static = frozenset(t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *tensors_in(batch)))
    sharded = any(map(is_sharded, model.modules()))
    adding = hold_gradients and not sharded  # a sharded gradient is added to after the block's backward
    outline = Outline(blocks, instruments, adding, hold_output, static, on_progress, tolerance)
    with _untouched(model), _without_collections():
        _reset_gradients(model, adding)
        outline.explore(forward, loss_of)
        _reset_gradients(model, adding)
        on_progress("measuring the model around its blocks")
        moments = outline.measure(forward, loss_of)
    on_progress("measuring the optimizer")
    cost = optimizer_cost(optimizer, instruments)
    step = _assemble(model, blocks, outline, moments, cost, optimizer, batch, hold_gradients)

    def again() -> StepProgram:
        with _untouched(model), _without_collections():
            _reset_gradients(model, adding)
            moments = outline.measure(forward, loss_of)
        return _assemble(model, blocks, outline, moments, cost, optimizer, batch, hold_gradients)

    def loss(use: Callable[[torch.Tensor], None]) -> None:
        with _untouched(model):
            use(outline.loss(forward, loss_of))

    return Capture(step, _assumptions(outline, step, cost, optimizer, hold_gradients, sharded), again, loss)


@contextmanager
def _untouched(model: torch.nn.Module) -> Iterator[None]:
    """Put gradients, buffers and random generators back as they are now; hooks on parameters do not run meanwhile.

    Such a hook may step an optimizer or start a reduction: what is captured is no training step. Some cannot be taken
    off (DistributedDataParallel's reducer), so others stand for the parameters.
    """
    gradients = [(p, p.grad) for p in model.parameters()]
    registries = [hooks for p in model.parameters() for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)]
    registered = [(hooks, dict(hooks)) for hooks in registries if hooks]
    buffers = Buffers(model)
    for hooks, _ in registered:
        hooks.clear()
    try:
        with _stand_ins_for_parameters(model), restored(devices_of(model)), torch.enable_grad():
            yield
    finally:
        for hooks, content in registered:
            hooks.update(content)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        buffers.restore()


@contextmanager
def _stand_ins_for_parameters(model: torch.nn.Module) -> Iterator[None]:
    """Parameters that share the bytes of the model's own, and nothing else, are in their places while this is open.

    Subclasses are left alone: they know more than their bytes, or others look after them (``fully_shard``).
    """
    twins: dict[int, torch.nn.Parameter] = {}
    places = [
        (child._parameters, name, parameter)
        for child in model.modules()
        for name, parameter in child._parameters.items()
        if type(parameter) is torch.nn.Parameter
    ]
    for holder, name, parameter in places:
        if id(parameter) not in twins:
            twin = twins[id(parameter)] = torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
            twin.__dict__.update(parameter.__dict__)
        holder[name] = twins[id(parameter)]
    try:
        yield
    finally:
        for holder, name, parameter in places:
            holder[name] = parameter


@contextmanager
def _without_collections() -> Iterator[None]:
    """Let no garbage from before go while live bytes are being watched: the log would take it for a free of its own."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _reset_gradients(model: torch.nn.Module, hold_gradients: bool) -> None:
    for parameter in model.parameters():
        held = hold_gradients and parameter.requires_grad
        parameter.grad = torch.zeros_like(parameter) if held else None


def _assemble(
    model: torch.nn.Module,
    blocks: Sequence[Block],
    outline: Outline,
    moments: dict[str, Moment],
    cost: OptimizerCost,
    optimizer: torch.optim.Optimizer | None,
    batch: Any,
    hold_gradients: bool,
) -> StepProgram:
    calls = outline.calls
    keys = [(call.kind, outline.surroundings(number)) for number, call in enumerate(calls)]
    kinds = list(dict.fromkeys(keys))
    modules = [blocks[calls[keys.index(key)].block].module for key in kinds]
    programs = tuple(
        _program(outline.captures[kind].program(around), module, hold_gradients)
        for (kind, around), module in zip(kinds, modules, strict=True)
    )
    runs = tuple(map(kinds.index, keys))
    phases = phases_of(outline, moments, [programs[program] for program in runs])
    left_bytes = phases.left_bytes
    trainable = [p for p in model.parameters() if p.requires_grad]
    outside = None
    if outline.record is not None:
        outside = outside_allocations(outline.record, len(calls), cost.events)
    if outside is None:  # requests of blocks alone are of no use
        programs = tuple(replace(program, allocations=None) for program in programs)
    return StepProgram(
        programs=programs,
        blocks=runs,
        block_names=tuple(blocks[call.block].name for call in calls),
        parameter_bytes=storage_bytes(model.parameters()),
        buffer_bytes=storage_bytes(model.buffers()) + outline.instruments.resident_bytes,
        optimizer_bytes=max(cost.state_bytes, state_bytes(optimizer) if optimizer is not None else 0),
        batch_bytes=storage_bytes(tensors_in(batch)),
        held_gradient_bytes=storage_bytes(trainable) if hold_gradients else 0,
        embedding_forward=phases.embedding_forward,
        head=phases.head,
        embedding_backward=phases.embedding_backward,
        optimizer_step=Phase(seconds=cost.seconds, peak_bytes=left_bytes + cost.peak_bytes, left_bytes=left_bytes),
        gaps=phases.gaps,
        outside=outside,
    )


def _program(program: BlockProgram, block: torch.nn.Module, hold_gradients: bool) -> BlockProgram:
    """The program of ``block`` with what ``fully_shard`` does to its gradients: they are gathered into one buffer when
    its backward is over, and only this process's part stays.
    """
    if not is_sharded(block):
        return program
    own_bytes = storage_bytes(parameter for parameter in block.parameters() if parameter.requires_grad)
    reducing_bytes = program.output_gradient_bytes + 2 * program.gradient_bytes + own_bytes
    return replace(
        program,
        gradient_bytes=0 if hold_gradients else own_bytes,
        backward_peak_bytes=max(program.backward_peak_bytes, reducing_bytes),
    )


def _assumptions(
    outline: Outline,
    step: StepProgram,
    cost: OptimizerCost,
    optimizer: torch.optim.Optimizer | None,
    hold_gradients: bool,
    sharded: bool,
) -> tuple[str, ...]:
    ran = "captured dry" if outline.instruments.dry else "measured for real"
    said = [
        f"{len(outline.captures)} of {step.num_blocks} blocks {ran}, the others do the same",
        f"the model's output is {'held until backward is over' if outline.hold_output else 'dropped before backward'}",
        "gradients stay allocated between steps" if hold_gradients else "gradients are set to None between steps",
    ]
    if sharded:
        said.append(
            "parameters, gradients and optimizer states are this process's part; gathered parameters are counted as "
            "while capturing, and those that FSDP gathers ahead are not"
        )
    if outline.record is not None and step.outside is None:
        said.append(
            "requests of memory are not known one by one: backward does not reach the blocks in their reverse order"
        )
    if optimizer is None:
        said.append("no optimizer was given: its states and its step are not counted")
    elif not cost.exact:
        said.append(f"{type(optimizer).__name__}'s bytes are scaled up from a part of the parameters")
    for capture in outline.captures.values():
        if not capture.tape.steady:
            said.append(f"{capture.name} keeps everything: {capture.tape.unsteady_reason}")
        elif capture.tape.prefix is not None:
            said.append(
                f"{capture.name} keeps what it saves from the first op whose results depend on data on "
                f"({capture.tape.prefix.reason}), and as many bytes of it as with this batch: others may take more"
            )
        if capture.num_refuted:
            said.append(
                f"{capture.name}: {capture.num_refuted} ops do not give the same bits again and are not replayed"
            )
        if capture.unseen_bytes < -_NOTABLE_BYTES:
            said.append(f"{capture.name}: {format_bytes(-capture.unseen_bytes)} that the tape counts are not allocated")
        if capture.held_bytes:
            said.append(f"{capture.name} holds {format_bytes(capture.held_bytes)} that only the allocator sees")
    return tuple(said)
