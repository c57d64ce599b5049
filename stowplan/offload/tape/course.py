"""A tape with a decision for every saved value: what all calls of one block and signature have in common."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

import torch

from stowplan.core.program import Action
from stowplan.offload.tape.replay import Replay
from stowplan.offload.tape.rng import random_devices
from stowplan.offload.tape.tape import Geometry, Origin, Tape

__all__ = ["Course", "Fate", "SlotCourse", "allowed_actions"]


class Fate(Enum):
    """What packing does with a slot."""

    PASS = "pass"  # parameters: handed through
    KEEP = "keep"
    SWAP = "swap"
    RECOMPUTE = "recompute"


class SlotCourse(NamedTuple):
    """What packing needs to know of one slot, beside its tensor."""

    fate: Fate
    outlives: bool  # made before the node that saves it, so that keeping it as it is closes no circle of references
    source: bool  # the replay starts from it, so the run keeps it too
    value: int
    geometry: Geometry
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Course:
    """What packing, swapping and replaying follow. ``actions`` has an entry for every saved value but parameters."""

    def __init__(self, tape: Tape, actions: Mapping[int, Action]) -> None:
        self.tape = tape
        self.actions = dict(actions)
        self.targets = tuple(v for v, action in actions.items() if action is Action.RECOMPUTE)
        self.writes_buffers = tape.writes_buffers
        self.open_ended = tape.prefix is not None  # more tensors may be saved than ``slots``, and are kept
        lasting = {slot.value for slot in tape.lasting_slots}
        self._available = {v for v, action in actions.items() if action is not Action.RECOMPUTE and v in lasting}
        ops, sources = tape.closure(self.targets, self._available)
        self.sources = frozenset(sources)
        self.random = random_devices(tape) if any(tape.ops[k].random for k in ops) else ()
        self.slots = tuple(
            SlotCourse(
                Fate(actions[slot.value].value) if slot.value in actions else Fate.PASS,
                not slot.newest and slot.value not in sources,
                slot.value in sources,
                slot.value,
                slot.geometry,
                slot.geometry.dtype,
                slot.geometry.size,
                slot.geometry.stride,
            )
            for slot in tape.lasting_slots
        )
        values = tape.values
        self.inputs = tuple(
            (v, values[v].position) for v in sources if values[v].origin is Origin.INPUT and v not in actions
        )
        self.parameters = tuple((v, values[v].parameter) for v in sources if values[v].origin is Origin.PARAMETER)
        self._geometries = {v: values[v].geometry for v in sources}
        for slot in reversed(tape.lasting_slots):  # a source that was saved is held as its first slot saw it
            if slot.value in actions:
                self._geometries[slot.value] = slot.geometry
        self._replays: dict[tuple[int, ...], Replay] = {}
        self.turns = itertools.count()  # of calls, for what is done in turn

    def replay(self, targets: tuple[int, ...]) -> Replay:
        """The function that makes ``targets``; compiled at first use."""
        if targets not in self._replays:
            self._replays[targets] = Replay(self.tape, targets, self._available, self._geometries)
        return self._replays[targets]


def allowed_actions(tape: Tape) -> dict[int, tuple[Action, ...]]:
    """What may be done with each saved value, parameters left out.

    Swapping and recomputing bring back the last version of a value, so a value that was saved before its last write
    is kept, as is what somebody else keeps alive anyway, what the block reached from outside, and what is saved where
    calls differ.
    """
    recomputable = tape.recomputable() if tape.steady else set()
    passing = tape.passing_values
    allowed: dict[int, tuple[Action, ...]] = {}
    for value in tape.saved_versions():
        v = tape.values[value]
        if v.origin is Origin.PARAMETER:
            continue
        free = not v.pinned and v.origin is not Origin.OUTSIDE and value not in passing
        movable = tape.steady and tape.saved_final(value) and free
        allowed[value] = (
            Action.KEEP,
            *((Action.SWAP,) if movable else ()),
            *((Action.RECOMPUTE,) if value in recomputable else ()),
        )
    return allowed
