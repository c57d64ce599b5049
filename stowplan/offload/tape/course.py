"""A tape with a decision for every saved value: what all calls of one block and signature have in common."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import torch

from stowplan.core.program import Action, Decision, Split, swaps
from stowplan.offload.copies.protocol import Freight, Manifest
from stowplan.offload.tape.proof import RowTrials, Tolerance
from stowplan.offload.tape.replay import Replay
from stowplan.offload.tape.rng import random_devices
from stowplan.offload.tape.rows import num_tokens, row_bytes, row_wise, rows_at
from stowplan.offload.tape.tape import Geometry, Origin, Tape

__all__ = ["Course", "Fate", "Parts", "SlotCourse", "allowed_actions", "resolved"]


class Fate(Enum):
    """What packing does with a slot."""

    PASS = "pass"  # parameters: handed through
    KEEP = "keep"
    SWAP = "swap"
    RECOMPUTE = "recompute"
    SPLIT = "split"


class Parts(NamedTuple):
    """Where the parts of a split value are in its storage, in bytes: recomputed, swapped, kept, in this order."""

    swapped: slice
    kept: slice


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
    offset: int


class Course:
    """What packing, swapping and replaying follow. ``actions`` has an entry for every saved value but parameters, as
    ``resolved`` gives them.
    """

    def __init__(self, tape: Tape, actions: Mapping[int, Decision]) -> None:
        self.tape = tape
        self.actions = dict(actions)
        self.writes_buffers = tape.writes_buffers
        splits = {v: action for v, action in actions.items() if isinstance(action, Split)}
        self.num_rows = num_tokens(tape) if splits else 0
        self.parts = {v: _parts(split, row_bytes(tape.values[v], self.num_rows)) for v, split in splits.items()}
        self.rows = {v: split.recomputed for v, split in splits.items() if split.recomputed}
        self._rules = row_wise(tape, self.num_rows) if self.rows else {}
        self.targets = tuple(v for v, action in actions.items() if action is Action.RECOMPUTE or v in self.rows)
        self.open_ended = tape.prefix is not None  # more tensors may be saved than ``slots``, and are kept
        lasting = {slot.value for slot in tape.lasting_slots}
        self._available = {v for v in actions if v not in self.targets and v in lasting}
        ops, sources = tape.closure(self.targets, self._available)
        self.sources = frozenset(sources)
        self.random = random_devices(tape) if any(tape.ops[k].random for k in ops) else ()
        self.slots = tuple(
            SlotCourse(
                _fate(actions.get(slot.value)),
                not slot.newest and slot.value not in sources,
                slot.value in sources,
                slot.value,
                slot.geometry,
                *slot.geometry,
            )
            for slot in tape.lasting_slots
        )
        self.leaving, self.manifest = self._leaving()
        self.sources_away = tuple(v for v in sources if v in self.leaving or v in self.parts)
        values = tape.values
        self.inputs = tuple(
            (v, values[v].position) for v in sources if values[v].origin is Origin.INPUT and v not in actions
        )
        self.parameters = tuple((v, values[v].parameter) for v in sources if values[v].origin is Origin.PARAMETER)
        self._geometries = {v: values[v].geometry for v in sources}
        for slot in reversed(tape.lasting_slots):  # a source that was saved is held as its first slot saw it
            if slot.value in actions and slot.value not in splits:
                self._geometries[slot.value] = slot.geometry
        self._replays: dict[tuple[int, ...], Replay] = {}
        self.turns = itertools.count()  # of calls, for what is done in turn

    def _leaving(self) -> tuple[tuple[int, ...], Manifest]:
        """What is sent to the host when the block's forward is over: values in order of saving, and the rest of it."""
        freights: dict[int, Freight] = {}
        for slot in self.tape.lasting_slots:
            action, value = self.actions.get(slot.value), self.tape.values[slot.value]
            if slot.value not in freights and action is not None and swaps(action):
                parts = self.parts.get(slot.value)
                start, stop = (0, None) if parts is None else (parts.swapped.start, parts.swapped.stop)
                given = value.origin is Origin.INPUT
                freights[slot.value] = Freight(slot.geometry, value.size_bytes, start, stop, given)
        return tuple(freights), Manifest(tuple(freights.values()))

    def replay(self, targets: tuple[int, ...]) -> Replay:
        """The function that makes ``targets``; compiled at first use."""
        if targets not in self._replays:
            rows = {value: self.rows.get(value, 0) for value in targets}
            self._replays[targets] = Replay(
                self.tape, rows, self._available, self._geometries, self.num_rows, self._rules
            )
        return self._replays[targets]

    def recomputed_bytes(self, value: int) -> int:
        """Bytes of a target that a replay makes."""
        parts = self.parts.get(value)
        return self.tape.values[value].size_bytes if parts is None else int(parts.swapped.start)

    def trials(self, tolerance: Tolerance | None) -> RowTrials:
        """What the proof has to try before values are recomputed by rows."""
        points: dict[int, set[int]] = {}
        for value, rows in self.rows.items():
            for op in self._ops_by_rows(value):
                points.setdefault(op, set()).add(rows)
        return RowTrials(self.num_rows, self._rules, {op: sorted(rows) for op, rows in points.items()}, tolerance)

    def unproved(self) -> list[int]:
        """Values whose first rows do not come out as in the whole, as far as has been tried."""
        splits = {k: op.splits for k, op in enumerate(self.tape.ops)}
        return [v for v, rows in self.rows.items() if any(rows not in splits[op] for op in self._ops_by_rows(v))]

    def _ops_by_rows(self, value: int) -> Sequence[int]:
        """The ops that make no more than the first rows of ``value``, or of what it is made from."""
        targets = {target: self.rows.get(target, 0) for target in self.targets}
        others = self.rows.keys() - {value}
        ops, sources = self.tape.closure(targets, self._available)
        alone = {target: rows for target, rows in targets.items() if target not in others}
        return tuple(rows_at(self.tape, self._rules, ops, alone, sources | others, proved=False))


def _fate(action: Decision | None) -> Fate:
    if action is None:
        return Fate.PASS
    return Fate.SPLIT if isinstance(action, Split) else Fate(action.value)


def _parts(split: Split, row: int) -> Parts:
    begin, end = split.recomputed * row, (split.recomputed + split.swapped) * row
    return Parts(slice(begin, end), slice(end, None))


def resolved(tape: Tape, planned: Mapping[int, Decision]) -> dict[int, Decision]:
    """What can be done of what is planned, by value: saved values that are not in ``planned`` are kept.

    Where this tape allows less than the plan hoped for (another batch size, a value that has no rows here), a value
    that was to be recomputed in part is recomputed whole, which takes no host bytes that were not planned; else it is
    swapped, or kept if that may not be either.
    """
    num_rows = num_tokens(tape)
    rules = row_wise(tape, num_rows) if any(isinstance(action, Split) for action in planned.values()) else {}
    by_rows = {value for rule in rules.values() for _, value in rule.makes}
    result: dict[int, Decision] = {}
    for value, allowed in allowed_actions(tape).items():
        action = _simplified(planned.get(value, Action.KEEP), num_rows)
        if isinstance(action, Split):
            made = action.recomputed == 0 or (Action.RECOMPUTE in allowed and value in by_rows)
            fits = action.recomputed + action.swapped <= num_rows and row_bytes(tape.values[value], num_rows)
            possible = Action.SWAP in allowed and bool(fits) and made
            if not possible and action.recomputed:
                action = Action.RECOMPUTE
                possible = action in allowed
        else:
            possible = action in allowed
        result[value] = action if possible else Action.SWAP if Action.SWAP in allowed else Action.KEEP
    return result


def _simplified(action: Decision, num_rows: int) -> Decision:
    """A split that leaves the value whole is no split."""
    if isinstance(action, Split):
        whole = {(0, 0): Action.KEEP, (num_rows, 0): Action.RECOMPUTE, (0, num_rows): Action.SWAP}
        return whole.get((action.recomputed, action.swapped), action)
    return action


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
