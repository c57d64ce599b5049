"""The tape of one block for one input signature: ops, values and slots.

A value is a storage; tensors are views of values. In-place writes give a value new versions, so that (value, version)
is in single-assignment form. Nothing here holds the block's data, save constants that own no bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

import torch

from stowplan.offload.tape.rules import rules_of

__all__ = ["Geometry", "Origin", "Prefix", "Ref", "Slot", "Tape", "TapeOp", "TapeValue", "map_refs"]


class Origin(Enum):
    """Where a value comes from."""

    PARAMETER = "parameter"  # or a buffer: bound by name, never decided on
    INPUT = "input"  # an argument of the block's forward
    OUTSIDE = "outside"  # some other tensor that the block reaches
    MADE = "made"  # by an op of the tape


class Geometry(NamedTuple):
    """How a tensor views its storage."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: torch.Tensor) -> Geometry:
        return Geometry(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


class Ref(NamedTuple):
    """A tensor argument of an op: a version of a value, seen through a geometry."""

    value: int
    version: int
    geometry: Geometry


class Slot(NamedTuple):
    """One tensor that autograd saved, in order of saving."""

    value: int
    version: int
    geometry: Geometry
    newest: bool  # the latest op made it: it may be an output of the very node that saves it


@dataclass(slots=True)
class TapeOp:
    """A recorded call. ``args`` and ``kwargs`` hold Refs in place of tensors; views are not recorded as ops."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str  # dotted name within the block of the module that called it
    reads: tuple[tuple[int, int], ...]
    makes: tuple[tuple[int, int], ...] = ()  # (position among the results, value)
    writes: tuple[tuple[int, int], ...] = ()  # (value, version after)
    random: bool = False
    replayable: bool = field(default=True, compare=False)
    seconds: float = field(default=0.0, compare=False)
    workspace_bytes: int = field(default=0, compare=False)
    flops: int = field(default=0, compare=False)
    splits: tuple[int, ...] = field(default=(), compare=False)  # first rows proved to be the same made alone


@dataclass(slots=True)
class TapeValue:
    """A storage. ``writers[version]`` is the op that made that version, None for what the block was given."""

    name: str
    origin: Origin
    size_bytes: int
    device: torch.device
    geometry: Geometry  # of the tensor that introduced it
    writers: list[int | None]
    position: int = -1  # among the flattened arguments, for inputs
    parameter: str = ""  # dotted name within the block, for parameters and buffers
    constant: torch.Tensor | None = field(default=None, compare=False)  # outside tensors without bytes of their own
    opaque: bool = False  # may hold bytes that no recorded op wrote
    lingers: bool = field(default=False, compare=False)  # kept alive by autocast's cache until the forward pass ends
    pinned: bool = field(default=False, compare=False)  # somebody else keeps it alive: moving it would save nothing

    @property
    def last_version(self) -> int:
        return len(self.writers) - 1


class Prefix(NamedTuple):
    """How much of a tape there was when an op came whose results depend on data. ``reason`` says which."""

    num_ops: int
    num_values: int
    num_slots: int
    reason: str


@dataclass(slots=True)
class Tape:
    """What one block did. ``steady`` is False where a later call of the same signature may do something else.

    With a ``prefix``, only so much of the tape is what every call does, and the rest is the recorded call's own: values
    that are saved in the rest are kept, and nothing of the rest is replayed.
    """

    ops: list[TapeOp] = field(default_factory=list)
    values: list[TapeValue] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    steady: bool = True
    unsteady_reason: str = ""
    prefix: Prefix | None = None

    def does_the_same(self, other: Tape) -> bool:
        """Are ops, values and slots the same? What was found out about them since does not count."""
        return (self.steady, self.prefix) == (other.steady, other.prefix) and self._lasting() == other._lasting()

    def _lasting(self) -> tuple[object, ...]:
        """What all calls have in common."""
        if self.prefix is None:
            return self.ops, self.values, self.slots
        num_ops, num_values, num_slots, _ = self.prefix
        values = [
            replace(value, writers=[op for op in value.writers if op is None or op < num_ops], opaque=False)
            for value in self.values[:num_values]
        ]
        return self.ops[:num_ops], values, self.slots[:num_slots]

    @property
    def lasting_slots(self) -> list[Slot]:
        """The slots that every call has."""
        return self.slots if self.prefix is None else self.slots[: self.prefix.num_slots]

    @property
    def passing_values(self) -> set[int]:
        """Values that are saved where calls differ: they are kept."""
        return {slot.value for slot in self.slots[len(self.lasting_slots) :]}

    def end_prefix(self, reason: str) -> None:
        """From here on calls may differ: what follows is the recorded call's own."""
        if self.prefix is None:
            self.prefix = Prefix(len(self.ops), len(self.values), len(self.slots), reason)

    def forbid_steady(self, reason: str) -> None:
        """Mark the tape as good for the call that made it only."""
        self.steady, self.unsteady_reason = False, reason

    @property
    def writes_buffers(self) -> bool:
        """Does a call leave buffers changed, as batch norms do? Then it must not simply be made twice."""
        seen = any(value.origin is Origin.PARAMETER and value.last_version > 0 for value in self.values)
        return seen or any(rules_of(op.func).writes_unseen for op in self.ops)

    def saved_versions(self) -> dict[int, set[int]]:
        """Versions in which each value was saved, in order of first saving."""
        versions: dict[int, set[int]] = {}
        for slot in self.slots:
            versions.setdefault(slot.value, set()).add(slot.version)
        return versions

    def saved_final(self, value: int) -> bool:
        """Was the value saved where all calls do, and never before its last version?"""
        if self.prefix is not None and all(slot.value != value for slot in self.lasting_slots):
            return False
        return self.saved_versions().get(value) == {self.values[value].last_version}

    def closure(self, targets: Iterable[int], available: Collection[int]) -> tuple[list[int], set[int]]:
        """Ops that must run again to make ``targets``, in order, and the values they take as they are.

        ``available`` values are at hand at their last version. Everything the ops need that is neither made by them
        nor available must be a parameter or an input: the second result lists these and the available ones used.
        """
        ops: set[int] = set()
        sources: set[int] = set()
        pending = [(value, self.values[value].last_version) for value in targets]
        wanted = set(pending)
        seen: set[tuple[int, int]] = set()
        while pending:
            key = pending.pop()
            if key in seen:
                continue
            seen.add(key)
            value, version = key
            writer = self.values[value].writers[version]
            at_hand = key not in wanted and version == self.values[value].last_version and value in available
            if writer is None or at_hand:
                sources.add(value)
                continue
            ops.add(writer)
            pending += self.ops[writer].reads
            if version:
                pending.append((value, version - 1))
        return sorted(ops), sources

    def recomputable(self) -> set[int]:
        """Saved values that can be made again from parameters, inputs and saved values that cannot.

        A closure holds earlier ops only, so one pass in order of making decides each value once.
        """
        saved = self.saved_versions()
        available = {v for v in saved if self.values[v].origin is not Origin.MADE and self.saved_final(v)}
        chosen: set[int] = set()
        passing = self.passing_values
        made = (v for v in saved if self.values[v].origin is Origin.MADE)
        for value in sorted(made, key=lambda v: self.values[v].writers[-1] or 0):
            if not self.saved_final(value):
                continue
            free = not self.values[value].pinned and value not in passing
            if free and self._can_replay(value, available):
                chosen.add(value)
            else:
                available.add(value)
        return chosen

    def _can_replay(self, target: int, available: Collection[int]) -> bool:
        ops, sources = self.closure([target], available)
        whole = all(
            self.ops[k].replayable and not any(self.values[v].opaque for _, v in self.ops[k].makes) for k in ops
        )
        return whole and all(self._can_bind(v, available) for v in sources)

    def _can_bind(self, value: int, available: Collection[int]) -> bool:
        """Can a later call without a dispatch mode get hold of this value at backward time?"""
        v = self.values[value]
        if value in available:
            return True
        if v.last_version > 0 or v.opaque:
            return False  # what the block was given was changed by it
        return v.origin in (Origin.PARAMETER, Origin.INPUT) or v.constant is not None


def map_refs(argument: Any, fn: Callable[[Ref], Any]) -> Any:
    """Replace every Ref in an op's argument by ``fn(ref)``."""
    if type(argument) is Ref:
        return fn(argument)
    if type(argument) is list:
        return [map_refs(item, fn) for item in argument]
    return argument
