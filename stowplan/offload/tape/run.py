"""One forward call of a block under a plan: what the hooks for saved tensors hand to autograd, and get back.

Note: who keeps what alive
    A tensor that is kept is handed to autograd itself (with its version, because hooks switch autograd's own check
    off). Of a value that is swapped or recomputed, autograd gets a ``Cell``, shared by all slots of that value, and
    nobody else holds the cell once the block's values are back: when autograd drops its nodes, the cell dies, and the
    tensor in it. So autograd's own freeing drives ours, whatever order backward takes, and no "backward is over" event
    is needed. Until then the run keeps what its replay will start from (``sources``), and gives it up right after.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stowplan.core.errors import ReplayMismatch
from stowplan.core.program import Action
from stowplan.offload.copies.protocol import CopyEngine, HostCopy, Stop
from stowplan.offload.observer import is_allocation_failure
from stowplan.offload.storages import modified_in_place
from stowplan.offload.tape.checks import Checks, Verify, Witness
from stowplan.offload.tape.course import Course, Fate, SlotCourse
from stowplan.offload.tape.parted import Parted
from stowplan.offload.tape.replay import Strayed, view_of
from stowplan.offload.tape.rng import Position, draw_position
from stowplan.offload.tape.tape import Geometry

_CPU = torch.device("cpu")
_PASS, _KEEP, _RECOMPUTE = Fate.PASS, Fate.KEEP, Fate.RECOMPUTE

__all__ = ["Cell", "Counters", "Departure", "Run", "unpack"]


class Departure(BaseException):
    """The block does not do what its tape says. Not an Exception, so that no model code catches it on the way."""


@dataclass(slots=True)
class Counters:
    """What was done since a plan was applied."""

    swapped_bytes: int = 0  # sent to the host
    returned_bytes: int = 0  # sent back; less than swapped_bytes where the device's own bytes were still there
    recomputed_bytes: int = 0
    recorded_calls: int = 0
    steady_calls: int = 0
    departures: int = 0
    allocation_failures: int = 0  # while values were brought back for backward


class Cell:
    """The place of one value of one run. ``tensor`` is None while the value is away; ``version`` guards a kept one.

    ``geometry`` is the tensor's own, as far as it is known; ``address`` where its storage was in the forward pass.
    """

    __slots__ = ("__weakref__", "address", "geometry", "host", "run", "tensor", "value", "version")

    def __init__(self, run: Run, value: int) -> None:
        self.run: Run | None = run
        self.value = value
        self.tensor: torch.Tensor | None = None
        self.geometry: Geometry | None = None
        self.address = 0
        self.version: int | None = None
        self.host: HostCopy | Parted | None = None


class Run:
    """One forward call. ``packer`` and ``seal`` belong to forward; ``unpack`` has ``restore`` called in backward.

    A call whose tape is known follows its ``course`` from the start; one that is being recorded holds everything
    (``pack_recording``) until ``adopt`` or ``keep_all``.
    """

    def __init__(
        self, name: str, copies: CopyEngine, counters: Counters, checks: Checks, stop: Stop | None = None
    ) -> None:
        self.name = name
        self.copies = copies
        self.stop = stop  # where this call is among the forward pass's; None for one that is not going to be sealed
        self.counters = counters
        self.checks = checks
        self.failure_note = ""  # for an allocation that fails while values are brought back
        self.lock = threading.Lock()  # several threads may run backward on graphs that share this call
        self.slots: Iterator[SlotCourse] = iter(())  # those to come
        self.cells: dict[int, Cell] = {}
        self.departing: dict[int, tuple[torch.Tensor, int]] = {}  # to leave when the block is over, with versions
        self.sources: dict[int, torch.Tensor | HostCopy | Parted] = {}
        self.versions: list[tuple[torch.Tensor, int, int]] = []
        self.waiting: list[weakref.ref[Cell]] = []
        self.witnesses: dict[int, Witness] = {}  # of values that will be compared when they are back

    def follow(
        self, course: Course, leaves: Sequence[Any], parameter_of: Callable[[str], torch.Tensor], position: Position
    ) -> None:
        """Take up ``course``; hold what the replay will start from.

        ``leaves`` are the call's flattened arguments, ``parameter_of`` finds a parameter or buffer of the block by its
        dotted name, ``position`` is where the random generators stood as the block began.
        """
        self.course = course
        self.position = {device: position[device] for device in course.random}
        self.ending: Position = {}
        self.turn = next(course.turns)
        self.witnessed = self._to_witness()
        for value, index in course.inputs:
            self._hold(value, leaves[index].detach())
        for value, name in course.parameters:
            self._hold(value, parameter_of(name).detach())  # the storage of now, whatever .data is set to

    def _to_witness(self) -> Collection[int]:
        course, verify = self.course, self.checks.verify
        if verify is Verify.ALL:
            return course.actions.keys()
        if verify is Verify.SAMPLE and course.targets:
            return (course.targets[self.turn % len(course.targets)],)
        return ()

    def _hold(self, value: int, tensor: torch.Tensor) -> None:
        self.sources[value] = tensor
        self.versions.append((tensor, tensor._version, value))

    # ---- forward --------------------------------------------------------------------------------------------------
    def packer(self) -> Callable[[torch.Tensor], Any]:
        """The hook that gives what autograd keeps in place of a tensor; one flat function, as it runs for every slot.

        It raises Departure where the tape says something else.
        """
        course, cells, departing, witnessed = self.course, self.cells, self.departing, self.witnessed
        slots = self.slots = iter(course.slots)
        open_ended = course.open_ended

        def pack(tensor: torch.Tensor) -> Any:
            try:
                fate, outlives, source, value, geometry, dtype, size, stride, offset = next(slots)
            except StopIteration:
                if open_ended:
                    return tensor.detach(), tensor._version
                raise Departure(f"more than {len(course.slots)} saved tensors") from None
            if fate is _KEEP and not source:  # whatever it is, it is kept
                if outlives:
                    return tensor, tensor._version
                kept = tensor.detach()
                return kept, kept._version
            if fate is _PASS:
                return tensor, tensor._version
            if (
                tensor.shape != size
                or tensor.dtype is not dtype
                or tensor.stride() != stride
                or tensor.storage_offset() != offset
            ):
                raise Departure(f"{Geometry.of(tensor)} is saved where the tape has {geometry}")
            if fate is _KEEP:
                kept = tensor.detach()
                if value not in self.sources:
                    self._hold(value, kept)
                return kept, kept._version
            cell = cells.get(value)
            address = tensor.data_ptr() - offset * dtype.itemsize
            if cell is None:
                cell = cells[value] = Cell(self, value)
                cell.address = address
                if fate is not _RECOMPUTE:
                    departing[value] = tensor.detach(), tensor._version
                if value in witnessed:
                    self._witness(value, tensor)
            elif cell.address != address:
                raise Departure(f"another tensor is saved where the tape has {course.tape.values[value].name} again")
            return cell, geometry

        return pack

    def pack_recording(self, tensor: torch.Tensor, value: int, geometry: Geometry) -> Any:
        """Like ``packer``'s hook, while the tape is still being written: everything is held until ``adopt``."""
        cell = self.cells.get(value)
        if cell is None or cell.version != tensor._version:
            cell = self.cells[value] = Cell(self, value)
            cell.tensor = tensor.detach()
            cell.version = tensor._version
        return cell, geometry

    def adopt(self) -> None:
        """Turn what ``pack_recording`` held into what ``packer`` would have made of it under the run's course."""
        course = self.course
        for value, cell in list(self.cells.items()):
            assert cell.tensor is not None
            action = course.actions[value]
            if action is Action.KEEP:
                if value in course.sources:
                    self._hold(value, cell.tensor)
                del self.cells[value]
                cell.run = None
                continue
            if action is not Action.RECOMPUTE:
                self.departing[value] = cell.tensor, cell.tensor._version
            if value in self.witnessed:
                self._witness(value, cell.tensor)
            cell.tensor, cell.version = None, None

    def keep_all(self) -> None:
        """Leave what ``pack_recording`` held to autograd alone."""
        for cell in self.cells.values():
            cell.run = None
        self.cells.clear()

    def drop_all(self) -> None:
        """Let go of what was packed; the call's graph is of no use any more."""
        for cell in self.cells.values():
            cell.tensor = cell.run = None
        self.cells.clear()
        self.departing.clear()

    def seal(self) -> None:
        """The block's forward is over: send values to the host. Raises Departure if slots are missing."""
        if next(self.slots, None) is not None:
            raise Departure(f"fewer than {len(self.course.slots)} saved tensors")
        course, cells, departing = self.course, self.cells, self.departing
        for value, (tensor, version) in departing.items():
            if tensor._version != version:
                raise Departure(f"{course.tape.values[value].name} is changed in place after it was saved")
        assert self.stop is not None
        tensors = [departing[value][0] for value in course.leaving]
        manifest = course.manifest.fitting(tensors)
        self.counters.swapped_bytes += manifest.size_bytes
        for value, host in zip(course.leaving, self.copies.send(self.stop, manifest, tensors), strict=True):
            cells[value].host = host
        for value, parts in course.parts.items():
            cell, geometry = cells[value], course.tape.values[value].geometry
            assert not isinstance(cell.host, Parted)
            cell.host = Parted(departing[value][0], parts.kept, geometry, cell.host)
        departing.clear()
        for value in course.sources_away:
            source = cells[value].host
            assert source is not None
            self.sources[value] = source
        if _CPU in self.position:
            self.ending = draw_position([_CPU])
        self.waiting = [weakref.ref(cell) for cell in self.cells.values()]
        self.cells.clear()

    def _witness(self, value: int, tensor: torch.Tensor) -> None:
        self.witnesses[value] = self.checks.witness(tensor, self.turn)

    # ---- backward -------------------------------------------------------------------------------------------------
    def restore(self) -> None:
        """Bring back every value of the block that is still wanted: copy in, then replay."""
        try:
            self._restore()
        except (RuntimeError, MemoryError) as error:
            if is_allocation_failure(error):
                self.counters.allocation_failures += 1
                error.add_note(f"stowplan: while values of {self.name} were brought back for backward.")
                error.add_note(self.failure_note)
            raise

    def _restore(self) -> None:
        course = self.course
        wanted: dict[int, Cell] = {}
        hosts: list[HostCopy | Parted] = []
        for ref in self.waiting:
            cell = ref()
            if cell is not None:
                wanted[cell.value] = cell
                if cell.host is not None:
                    hosts.append(cell.host)
        self._fetch(hosts)
        targets = tuple(v for v in course.targets if v in wanted and not _is_complete(wanted[v].host))
        to_make = set(targets)
        for value, cell in wanted.items():  # whoever sees a tensor takes it: a target's comes when all rows are there
            host = cell.host
            if host is not None and value not in to_make:
                cell.tensor, cell.geometry = host.tensor, host.geometry
        if targets:
            for tensor, version, value in self.versions:
                if tensor._version != version:
                    raise _changed(course.tape.values[value].name)
            self._replay(targets, wanted)
        for value, witness in self.witnesses.items():
            if value in wanted and (tensor_back := wanted[value].tensor) is not None:
                self.checks.compare(witness, tensor_back, self.name, self.course.tape.values[value].name)
        for cell in wanted.values():
            cell.run = cell.host = None
        self.waiting.clear()
        self.sources.clear()
        self.versions.clear()
        self.witnesses.clear()

    def _fetch(self, hosts: Sequence[HostCopy | Parted]) -> None:
        """Have what is on the host back."""
        copies = [host if isinstance(host, HostCopy) else host.copy for host in hosts]
        assert self.stop is not None
        away = [copy for copy in copies if copy is not None]
        self.counters.returned_bytes += self.copies.fetch(self.stop, away)

    def _replay(self, targets: tuple[int, ...], wanted: Mapping[int, Cell]) -> None:
        """Make ``targets`` again, whole or their first rows, from sources that only the replay wants and others."""
        course = self.course
        replay = course.replay(targets)
        lone = [source for v in replay.sources if v not in wanted and (source := self.sources.get(v)) is not None]
        away = [source for source in lone if not isinstance(source, torch.Tensor)]
        if away:
            self._fetch(away)
        joined = {v: host.tensor for v in replay.joined if (host := wanted[v].host) is not None}
        try:
            tensors = replay(
                [self._source(v) for v in replay.sources], self.position, self.ending, list(joined.values())
            )
        except Strayed:
            raise _disturbed(self.name) from None
        for value, tensor in (*joined.items(), *zip(replay.whole, tensors, strict=True)):
            wanted[value].tensor = tensor
        self.counters.recomputed_bytes += sum(course.recomputed_bytes(value) for value in targets)

    def _source(self, value: int) -> torch.Tensor:
        source = self.sources.get(value)
        if isinstance(source, HostCopy | Parted):
            return source.tensor
        if source is not None:
            return source
        constant = self.course.tape.values[value].constant
        assert constant is not None
        return constant


def _is_complete(host: HostCopy | Parted | None) -> bool:
    """Is a value that was to be recomputed by rows still there?"""
    return isinstance(host, Parted) and host.complete


def unpack(packed: Any) -> torch.Tensor:
    """The tensor that a pack hook was given."""
    first, rest = packed
    if type(first) is Cell:
        tensor = first.tensor
        if tensor is None:
            run = first.run
            if run is not None:
                with run.lock:
                    if first.tensor is None:
                        run.restore()
            tensor = first.tensor
            assert tensor is not None
        if first.version is not None and tensor._version != first.version:
            raise modified_in_place(tensor, first.version)
        return tensor if first.geometry is rest else view_of(tensor, rest)
    if first._version != rest:
        raise modified_in_place(first, rest)
    return first  # type: ignore[no-any-return]


def _changed(name: str) -> ReplayMismatch:
    return ReplayMismatch(
        f"{name!r} was changed in place between the block's forward and its backward, so the block's values cannot be "
        f"recomputed from it. Make the change after backward, or leave this block out of the plan (blocks=)."
    )


def _disturbed(name: str) -> ReplayMismatch:
    return ReplayMismatch(
        f"random numbers of {name} cannot be drawn again: another thread used the CPU's random generator while the "
        f"block's forward or its replay ran. Give that thread a torch.Generator of its own, or leave this block out of "
        f"the plan (blocks=)."
    )
