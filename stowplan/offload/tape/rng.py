"""The default random generators of the devices that a tape draws from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from stowplan.offload.tape.tape import Tape

__all__ = ["Position", "draw_position", "random_devices", "restored", "rewound", "set_position", "stands_at"]

_CPU = torch.device("cpu")

# State of each generator at one moment, by device.
Position = dict[torch.device, torch.Tensor]


def random_devices(tape: Tape) -> tuple[torch.device, ...]:
    """Devices whose generators the tape's ops use."""
    devices = dict.fromkeys(
        tape.values[value].device for op in tape.ops if op.random for value, _ in (*_made(op.makes), *op.writes)
    )
    return tuple(devices)


def draw_position(devices: Iterable[torch.device]) -> Position:
    """Where the generators stand now."""
    return {device: _generator(device).get_state() for device in devices}


@contextmanager
def rewound(position: Position) -> Iterator[None]:
    """Put the generators back to ``position`` and, at the end, to where they stood."""
    with restored(position):
        set_position(position)
        yield


@contextmanager
def restored(devices: Iterable[torch.device]) -> Iterator[None]:
    """Put the generators, at the end, back to where they stood."""
    now = draw_position(devices)
    try:
        yield
    finally:
        set_position(now)


def stands_at(position: Position) -> bool:
    """Do the generators stand at ``position``?"""
    return all(torch.equal(_generator(device).get_state(), state) for device, state in position.items())


def set_position(position: Position) -> None:
    """Move the generators to ``position``."""
    for device, state in position.items():
        _generator(device).set_state(state)


def _generator(device: torch.device) -> torch.Generator:
    if device == _CPU:
        return torch.default_generator
    module = getattr(torch, device.type)
    index = module.current_device() if device.index is None else device.index  # type: ignore[redundant-expr]
    generator: torch.Generator = module.default_generators[index]
    return generator


def _made(makes: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    return ((value, position) for position, value in makes)
