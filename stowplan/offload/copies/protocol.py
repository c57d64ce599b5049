"""What a copy engine does, and what it hands out.

A *stop* is one call of a block in a forward pass; *passage* is the pass. Values leave at a stop and come back at it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch

from stowplan.offload.host_slab import Span
from stowplan.offload.storages import modified_in_place
from stowplan.offload.tape.replay import view_of
from stowplan.offload.tape.tape import Geometry

__all__ = ["CopyEngine", "HostCopy", "Passage", "Portion", "Stop"]


class Portion(NamedTuple):
    """Bytes [``start``, ``stop``) of the storage behind ``tensor``; by default all of them.

    ``geometry`` is what the value looks like when it is back.
    """

    tensor: torch.Tensor
    geometry: Geometry
    start: int = 0
    stop: int | None = None


class HostCopy:
    """A value on the host. Its host bytes go back when they have been read, or nobody wants them.

    ``content`` is a tensor over the value's whole storage on the device, None while there is none; of a new one only
    the bytes from ``start`` to ``stop`` are filled, the others are for somebody else to write. ``mark`` is of the copy
    that is on its way and that compute (``compute``, on whose stream ``content`` was allocated) has not waited for.
    ``complete`` tells content that is the value's own, all of it, because it never left; ``fault`` is set if somebody
    changed that in place (it had ``version``) while the copy may have been on its way.
    """

    __slots__ = (
        "__weakref__", "_abandon", "complete", "compute", "content", "device", "fault", "geometry", "mark", "num_bytes",
        "span", "start", "stop", "version",
    )  # fmt: skip

    def __init__(self, portion: Portion, abandon: Callable[[HostCopy], None]) -> None:
        tensor, self.geometry, self.start, stop = portion
        self.device = tensor.device
        self.num_bytes = tensor.untyped_storage().nbytes()  # of the whole storage
        self.stop = self.num_bytes if stop is None else stop
        self.span: Span | None = None
        self.content: torch.Tensor | None = None
        self.complete = False
        self.version = tensor._version
        self.fault: RuntimeError | None = None
        self.mark: Any = None
        self.compute: Any = None
        self._abandon = abandon

    def check_untouched(self) -> None:
        """The copy is over: was the value what it was when it was sent, all the while?"""
        if self.content is not None and self.content._version != self.version:
            self.fault = modified_in_place(self.content, self.version)

    def new_content(self) -> torch.Tensor:
        """Device memory for the whole value, to be filled; seen as the value where it can be."""
        dtype, size, stride, _ = geometry = self.geometry
        if _spanned_bytes(geometry) == self.num_bytes:
            return torch.empty_strided(size, stride, dtype=dtype, device=self.device)
        return torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)

    @property
    def tensor(self) -> torch.Tensor:
        """The value on the device, after ``fetch``."""
        assert self.content is not None
        assert self.mark is None, "compute has not waited for this value"
        if self.fault is not None:
            raise self.fault
        return view_of(self.content, self.geometry)

    def __del__(self) -> None:
        # By the garbage collector too, in any thread and in the middle of anything: this may take no lock.
        if self.span is not None or self.mark is not None:
            self._abandon(self)


@cache
def _spanned_bytes(geometry: Geometry) -> int:
    """Bytes of the storage that a new tensor of this geometry gets; 0 where it would begin elsewhere."""
    if geometry.offset or not all(geometry.size):
        return 0
    last = sum((size - 1) * stride for size, stride in zip(geometry.size, geometry.stride, strict=True))
    return (last + 1) * geometry.dtype.itemsize


class Passage:
    """The stops of one forward pass that sent something, by place."""

    __slots__ = ("last", "origin", "stops")

    def __init__(self, origin: int) -> None:
        self.origin = origin  # blocks that this thread called before
        self.last = -1  # the latest place
        self.stops: dict[int, weakref.ref[Stop]] = {}


class Stop:
    """One call of a block: ``place`` counts the calls of the pass. Alive as long as something may come back to it."""

    __slots__ = ("__weakref__", "compute", "copies", "name", "passage", "place", "started")

    def __init__(self, passage: Passage, place: int, name: str, compute: Any) -> None:
        self.passage = passage
        self.place = place
        self.name = name
        self.compute = compute  # the stream that the block runs on
        self.copies: list[weakref.ref[HostCopy]] = []
        self.started: Any = None  # when, if somebody traces

    def at_hand(self) -> list[HostCopy]:
        """What is still wanted of what was sent, in order."""
        return [copy for ref in self.copies if (copy := ref()) is not None]


class CopyEngine(Protocol):
    """How swapped values travel.

    ``begin`` is called as a block's forward begins; ``send`` as it ends, with what is to leave: the tensors may be
    dropped then. ``fetch`` is called as its backward begins: after it ``tensor`` of each copy may be used. ``turn`` is
    for blocks whose backward begins without anything to fetch. Both give the bytes that started on their way back.
    ``window`` is for how many blocks bytes may be on their way, 0 where they never are.
    """

    window: int

    def begin(self, place: int, name: str) -> Stop: ...

    def send(self, stop: Stop, portions: Sequence[Portion]) -> list[HostCopy]: ...

    def fetch(self, stop: Stop, copies: Sequence[HostCopy]) -> int: ...

    def turn(self, stop: Stop) -> int: ...
