"""Carrying a plan out on the blocks of one model.

The first call of each block (and of each new signature) runs under the recorder and is proved replayable; later calls
run with hooks for saved tensors alone, no dispatch mode. Blocks that keep everything are not touched at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stowplan.core.errors import PlanMismatch
from stowplan.core.program import Action
from stowplan.offload.arguments import flatten, flatten_named, signature
from stowplan.offload.blocks import Block, refuse_unsupported
from stowplan.offload.copies import CopyEngine
from stowplan.offload.intercept import Forward, Interception
from stowplan.offload.tape.course import Course, allowed_actions
from stowplan.offload.tape.record import Recorder
from stowplan.offload.tape.rng import Position, draw_position, set_position
from stowplan.offload.tape.run import Counters, Departure, Run, unpack
from stowplan.offload.tape.tape import Origin, Tape
from stowplan.offload.tape.verify import verify

__all__ = ["Engine", "PlannedBlock", "Recording", "record_call"]

# A block whose calls keep departing from its tape is left alone after this many.
_PATIENCE = 3


class Engine:
    """Hooks a plan's decisions into ``blocks`` and, on ``remove``, takes all of it away again.

    Args:
        decisions: per block, the action of each saved value by name.
        copies: moves swapped values.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: Sequence[Block],
        decisions: Sequence[Mapping[str, Action]],
        copies: CopyEngine,
    ) -> None:
        refuse_unsupported(model, blocks)
        self.counters = Counters()
        self.blocks = [
            PlannedBlock(block, actions, copies, self.counters)
            for block, actions in zip(blocks, decisions, strict=True)
            if any(action is not Action.KEEP for action in actions.values())
        ]

    def remove(self) -> None:
        """Give every block its own forward back. Graphs already made stay valid."""
        for block in self.blocks:
            block.interception.remove()


class PlannedBlock:
    """One block under a plan."""

    def __init__(
        self, block: Block, planned: Mapping[str, Action], copies: CopyEngine, counters: Counters
    ) -> None:
        self.name, self.module = block
        self.planned = dict(planned)
        self.copies = copies
        self.counters = counters
        self.courses: dict[tuple[Any, ...], Course | None] = {}  # None: keep everything
        self.devices = _devices_of(self.module)
        self.num_departures = 0
        self.busy = False
        self.interception = Interception(self.module, self.call)

    def call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's forward, its saved tensors packed by plan."""
        if self.busy or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves = flatten(args, kwargs)
        key = signature(leaves, self.module.training)
        self.busy = True
        try:
            if key not in self.courses:
                return self._record(key, forward, args, kwargs)
            course = self.courses[key]
            if course is None:
                return forward(*args, **kwargs)
            return self._follow(key, course, leaves, forward, args, kwargs)
        finally:
            self.busy = False

    def _follow(
        self,
        key: tuple[Any, ...],
        course: Course,
        leaves: list[Any],
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        position = draw_position(self.devices)
        run = Run(self.copies, self.counters)
        run.follow(course, leaves, self.parameter_of, position)
        try:
            with torch.autograd.graph.saved_tensors_hooks(run.pack, unpack):
                output = forward(*args, **kwargs)
            run.seal()
        except Departure:
            # What was dropped already cannot be had back: run the block again from its start, under the recorder.
            self.counters.departures += 1
            self.num_departures += 1
            output = None
            set_position(position)
            return self._record(key, forward, args, kwargs)
        self.counters.steady_calls += 1
        return output

    def _record(
        self, key: tuple[Any, ...], forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        recording = record_call(self, forward, args, kwargs)
        self.counters.recorded_calls += 1
        tape, run = recording.tape, recording.run
        if not tape.steady or self.num_departures >= _PATIENCE:
            self.courses[key] = None
            run.keep_all()
            reason = tape.unsteady_reason or f"its calls differ from each other ({self.num_departures} times)"
            warnings.warn(f"{self.name} keeps everything it saves: {reason}.", RuntimeWarning, stacklevel=2)
            return recording.output
        course = self.courses[key] = Course(tape, self._resolve(tape))
        run.follow(course, recording.leaves, self.parameter_of, recording.position)
        run.adopt()
        run.seal()
        return recording.output

    def _resolve(self, tape: Tape) -> dict[int, Action]:
        """The planned actions by value. Values that the plan does not know are kept."""
        allowed = allowed_actions(tape)
        names = {tape.values[v].name: v for v in allowed}
        missing = sorted(name for name, action in self.planned.items() if action is not Action.KEEP and name not in names)
        if missing and not self.courses:
            raise PlanMismatch(
                f"{self.name} does not save {missing[0]!r}, which the plan decides on (it saves: "
                f"{', '.join(sorted(names))}). The plan was made for another model, dtype, attention implementation or "
                f"autocast setting: plan anew with this one."
            )
        actions: dict[int, Action] = {}
        for name, value in names.items():
            action = self.planned.get(name, Action.KEEP)
            if action not in allowed[value]:
                action = Action.SWAP if Action.SWAP in allowed[value] else Action.KEEP
            actions[value] = action
        return actions

    def parameter_of(self, name: str) -> torch.Tensor:
        """The block's parameter or buffer of that dotted name, as it is now."""
        owner, _, leaf = name.rpartition(".")
        tensor: torch.Tensor = getattr(self.module.get_submodule(owner), leaf)
        return tensor


class Recording:
    """One recorded call: its tape, its run (holding every saved value) and its output."""

    def __init__(
        self, tape: Tape, run: Run, output: Any, leaves: list[Any], position: Position, given: dict[int, torch.Tensor]
    ) -> None:
        self.tape = tape
        self.run = run
        self.output = output
        self.leaves = leaves
        self.position = position
        self.given = given

    def truth(self) -> dict[int, torch.Tensor]:
        """The saved values as the forward pass had them."""
        return {v: cell.tensor for v, cell in self.run.cells.items() if cell.tensor is not None}


def record_call(
    block: PlannedBlock, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Recording:
    """Run a block once under the recorder, and prove its tape by replaying it against the true values."""
    leaves = flatten_named(forward, args, kwargs)
    position = draw_position(block.devices)
    recorder = Recorder(block.module, leaves)
    run = Run(block.copies, block.counters)

    def pack(tensor: torch.Tensor) -> Any:
        slot = recorder.save(tensor)
        if slot is None or recorder.tape.values[slot.value].origin is Origin.PARAMETER:
            return tensor, tensor._version
        return run.pack_recording(tensor, slot.value, slot.geometry)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), recorder.naming(), recorder:
        output = forward(*args, **kwargs)
    tape = recorder.finish()
    values = [leaf for _, leaf in leaves]
    recording = Recording(tape, run, output, values, position, _given(tape, values, block))
    if tape.steady:
        verify(tape, recording.given, recording.truth(), position)
    return recording


def _given(tape: Tape, leaves: Sequence[Any], block: PlannedBlock) -> dict[int, torch.Tensor]:
    """What a replay can bind: parameters, inputs and constants, by value."""
    given: dict[int, torch.Tensor] = {}
    for number, value in enumerate(tape.values):
        if value.origin is Origin.PARAMETER:
            given[number] = block.parameter_of(value.parameter)
        elif value.origin is Origin.INPUT:
            given[number] = leaves[value.position].detach()
        elif value.constant is not None:
            given[number] = value.constant
    return given


def _devices_of(module: torch.nn.Module) -> tuple[torch.device, ...]:
    devices = {tensor.device: None for tensor in (*module.parameters(), *module.buffers())}
    return tuple({torch.device("cpu"): None} | devices)
