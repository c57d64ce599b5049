"""One call of a block under the recorder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from stowplan.offload.arguments import flatten_named
from stowplan.offload.copies import CopyEngine, Stop
from stowplan.offload.intercept import Forward
from stowplan.offload.refusals import refuse_callers
from stowplan.offload.tape.checks import Checks
from stowplan.offload.tape.record import Recorder
from stowplan.offload.tape.rng import Position, draw_position
from stowplan.offload.tape.run import Counters, Run, unpack
from stowplan.offload.tape.tape import Origin, TapeOp

__all__ = ["Recording", "devices_of", "parameter_of", "record_call"]


@dataclass(slots=True)
class Recording:
    """What a recorded call left: the recorder with its tape, a run that holds every saved value, the output.

    ``position`` is where the random generators stood before the call; ``given`` what a replay can bind (parameters,
    inputs, constants) by value.
    """

    recorder: Recorder
    run: Run
    output: Any
    leaves: list[Any]
    position: Position
    given: dict[int, torch.Tensor]

    def truth(self) -> dict[int, torch.Tensor]:
        """The saved values as the forward pass had them, by value."""
        return {v: cell.tensor for v, cell in self.run.cells.items() if cell.tensor is not None}


def record_call(
    module: torch.nn.Module,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    copies: CopyEngine,
    counters: Counters,
    checks: Checks | None = None,
    name: str = "",
    observe: Callable[[TapeOp], object] = lambda op: None,
    stop: Stop | None = None,
) -> Recording:
    """Call ``forward`` of the block ``module`` once, recording what it does and holding all that it saves.

    ``name`` is what errors call the block; by default its class. ``observe`` is told of each recorded op, once it has
    run. ``stop`` is where the call is among the forward pass's, for a run that will be sealed. Raises UnsupportedModel
    for a block that is checkpointed or called by compiled code.
    """
    name = name or type(module).__name__
    refuse_callers(name)
    leaves = flatten_named(forward, args, kwargs)
    position = draw_position(devices_of(module))
    recorder = Recorder(module, leaves, name, observe)
    run = Run(name, copies, counters, checks or Checks(), stop)

    def pack(tensor: torch.Tensor) -> Any:
        slot = recorder.save(tensor)
        if slot is None or recorder.tape.values[slot.value].origin is Origin.PARAMETER:
            return tensor, tensor._version
        return run.pack_recording(tensor, slot.value, slot.geometry)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), recorder.naming(), recorder:
        output = forward(*args, **kwargs)
    given: dict[int, torch.Tensor] = {}
    for number, value in enumerate(recorder.tape.values):
        if value.origin is Origin.PARAMETER:
            given[number] = parameter_of(module, value.parameter)
        elif value.origin is Origin.INPUT:
            given[number] = leaves[value.position][1].detach()
        elif value.constant is not None:
            given[number] = value.constant
    return Recording(recorder, run, output, [leaf for _, leaf in leaves], position, given)


def parameter_of(module: torch.nn.Module, name: str) -> torch.Tensor:
    """The module's parameter or buffer of that dotted name, as it is now."""
    owner, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(module.get_submodule(owner), leaf)
    return tensor


def devices_of(module: torch.nn.Module) -> tuple[torch.device, ...]:
    """The CPU and every device that the module's parameters and buffers are on."""
    tensors = (*module.parameters(), *module.buffers())
    devices = {tensor.device: None for tensor in tensors if not isinstance(tensor, FakeTensor)}
    return tuple({torch.device("cpu"): None} | devices)
