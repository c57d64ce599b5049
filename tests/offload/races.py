"""Lanes that find races without luck: every access to memory must come after those that it conflicts with.

Compute and the two lanes each count what they do. A mark holds what its queue knows of all three counts, and waiting
for it adds that knowledge (vector clocks). Copies are made at once, so values are right whatever is missing; what is
judged is whether the order was certain.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from stowplan.offload.copies import HostCopy, OverlappedCopies, Stop
from stowplan.offload.copies.lanes import Pairs
from stowplan.offload.copies.trace import Trace
from stowplan.offload.host_slab import HostSlab

__all__ = ["WatchedCopies", "WatchedLanes"]

Clock = dict[str, int]


class Queue:
    """One of the three, and what it knows of all."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.knows: Clock = {"compute": 0, "to host": 0, "to device": 0}

    def tick(self) -> int:
        self.knows[self.name] += 1
        return self.knows[self.name]

    def wait(self, mark: Clock) -> None:
        self.knows = {name: max(count, mark[name]) for name, count in self.knows.items()}

    def mark(self) -> Clock:
        self.tick()
        return dict(self.knows)

    def stamp(self) -> float:
        return 0.0


class Access:
    """A copy that read or wrote host bytes from ``start`` to ``stop``."""

    def __init__(self, queue: str, count: int, writes: bool, start: int, stop: int) -> None:
        self.queue, self.count, self.writes, self.start, self.stop = queue, count, writes, start, stop


class CopyingQueue(Queue):
    def __init__(self, name: str, lanes: WatchedLanes) -> None:
        super().__init__(name)
        self.lanes = weakref.proxy(lanes)

    def copy(self, pairs: Pairs, block: str, trace: Trace | None) -> Clock:
        count = self.tick()
        for destination, source in pairs:
            destination.copy_(source)
            inside, host = (source, destination) if self.name == "to host" else (destination, source)
            self.lanes.see_host(self, count, host)
            self.lanes.see_device(self, count, inside)
        return dict(self.knows)

    def finish(self) -> None: ...


class WatchedLanes:
    """Lanes whose ``races`` says what was not in order."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self._compute = Queue("compute")
        self.to_host = CopyingQueue("to host", self)
        self.to_device = CopyingQueue("to device", self)
        self._host: list[Access] = []
        # By address while the memory is alive; who frees it must know of these.
        self._device: dict[int, tuple[str, int]] = {}

    def compute(self) -> Queue:
        return self._compute

    def is_done(self, mark: Clock) -> bool:
        return True

    def seconds_between(self, start: float, end: float) -> float:
        return end - start

    def see_host(self, queue: Queue, count: int, host: torch.Tensor) -> None:
        start = host.data_ptr()
        now = Access(queue.name, count, queue.name == "to host", start, start + host.numel())
        for before in self._host:
            overlaps = before.start < now.stop and now.start < before.stop
            if overlaps and (before.writes or now.writes) and queue.knows[before.queue] < before.count:
                self.races.append(f"{queue.name} touches host bytes that {before.queue} may be at work on")
        self._host = [
            a for a in self._host if not (a.queue == now.queue and now.start <= a.start and a.stop <= now.stop)
        ]
        self._host.append(now)

    def see_device(self, queue: Queue, count: int, device: torch.Tensor) -> None:
        if queue.knows["compute"] < self._compute.knows["compute"]:
            self.races.append(f"{queue.name} may touch device bytes before compute is done with them")
        self._device[device.untyped_storage().data_ptr()] = (queue.name, count)

    def check_at_hand(self, content: torch.Tensor, verb: str) -> None:
        name, count = self._device.get(content.untyped_storage().data_ptr(), ("compute", 0))
        if self._compute.knows[name] < count:
            self.races.append(f"compute {verb} device bytes that {name} may be at work on")


class WatchedCopies(OverlappedCopies):
    """The engine itself, asked where compute uses or frees bytes."""

    def __init__(self, slab: HostSlab, window: int) -> None:
        self.watched = WatchedLanes()
        super().__init__(slab, self.watched, window)
        self.freed: list[Any] = []

    @property
    def races(self) -> list[str]:
        return self.watched.races

    def begin(self, place: int, name: str) -> Stop:
        leaving = [copy for _, ref in self._way.leaving if (stop := ref()) for copy in stop.at_hand()]
        held = [(weakref.ref(copy), copy.content) for copy in leaving if copy.content is not None]
        held += [(None, content) for _, _, content in self._abandoned if content is not None]
        del leaving
        self.watched._compute.tick()  # the block before did something
        stop = super().begin(place, name)
        self._check_freed(held)
        return stop

    def fetch(self, stop: Stop, copies: Sequence[HostCopy]) -> int:
        held: list[Any] = [(None, content) for _, _, content in self._abandoned if content is not None]
        self.watched._compute.tick()
        travelling = super().fetch(stop, copies)
        for copy in copies:
            assert copy.content is not None
            self.watched.check_at_hand(copy.content, "uses")
        self._check_freed(held)
        return travelling

    def _check_freed(self, held: list[tuple[Any, torch.Tensor]]) -> None:
        for ref, content in held:
            copy = ref() if ref is not None else None
            if copy is None or copy.content is None:
                self.watched.check_at_hand(content, "frees")
