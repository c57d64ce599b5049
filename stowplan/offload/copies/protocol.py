"""What a copy engine does, what it is given, and what it hands out.

A *stop* is one call of a block in a forward pass; *passage* is the pass. Values leave at a stop and come back at it. A
*manifest* says what leaves at a stop, the same in every step; a *consignment* is what did leave in one of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from stowplan.offload.host_slab import Layout, Span
from stowplan.offload.tape.replay import view_of
from stowplan.offload.tape.tape import Geometry

__all__ = ["Consignment", "CopyEngine", "Freight", "HostCopy", "Manifest", "Passage", "Stop"]


class Freight:
    """What is known of a value before it leaves: bytes [``start``, ``stop``) of its storage of ``num_bytes`` travel, by
    default all of them.

    ``geometry`` is how the tensor that is sent sees its storage, and what the value looks like when it is back. It is
    ``dense`` if a new tensor of that geometry has the same storage. A value that was ``given`` to the block may be a
    view of a larger tensor in one call, and of another one in the next.
    """

    __slots__ = ("dense", "geometry", "given", "num_bytes", "size_bytes", "start", "stop")

    def __init__(
        self, geometry: Geometry, num_bytes: int, start: int = 0, stop: int | None = None, given: bool = False
    ) -> None:
        self.geometry = geometry
        self.num_bytes = num_bytes
        self.given = given
        self.start = start
        self.stop = num_bytes if stop is None else stop
        self.size_bytes = self.stop - start
        self.dense = not geometry.offset and _spanned_bytes(geometry) == num_bytes

    def in_storage_of(self, num_bytes: int) -> Freight:
        """The same of a storage that is of another size."""
        stop = None if self.size_bytes == self.num_bytes else self.stop
        return Freight(self.geometry, num_bytes, self.start, stop, self.given)

    def new_content(self, device: torch.device) -> torch.Tensor:
        """Device memory for the whole value, to be filled; seen as the value where it can be."""
        if self.dense:
            dtype, size, stride, _ = self.geometry
            return torch.empty_strided(size, stride, dtype=dtype, device=device)
        return torch.empty(self.num_bytes, dtype=torch.uint8, device=device)


def _spanned_bytes(geometry: Geometry) -> int:
    """Bytes from the first to the last element."""
    if not all(geometry.size):
        return 0
    last = sum((size - 1) * stride for size, stride in zip(geometry.size, geometry.stride, strict=True))
    return (last + 1) * geometry.dtype.itemsize


class Manifest:
    """What leaves at a stop, in order. Made once for all calls that do the same."""

    __slots__ = ("_uncertain", "freights", "layout", "size_bytes")

    def __init__(self, freights: Sequence[Freight]) -> None:
        self.freights = tuple(freights)
        self.layout = Layout([freight.size_bytes for freight in freights])
        self.size_bytes = sum(self.layout.sizes)  # that travel
        # What a tensor's geometry does not tell.
        self._uncertain = tuple((i, f.num_bytes) for i, f in enumerate(self.freights) if f.given or not f.dense)

    def fitting(self, tensors: Sequence[torch.Tensor]) -> Manifest:
        """Itself, if ``tensors``, which have the geometries, have the storages too; else one that is theirs."""
        if all(tensors[i].untyped_storage().nbytes() == num_bytes for i, num_bytes in self._uncertain):
            return self
        found = [tensor.untyped_storage().nbytes() for tensor in tensors]
        return Manifest([f.in_storage_of(num_bytes) for f, num_bytes in zip(self.freights, found, strict=True)])


class Consignment:
    """The host bytes of what left at a stop. They go back when nobody refers to it: each of its values was read, or
    died unread.
    """

    __slots__ = ("_give_back", "_held")

    def __init__(self, held: Sequence[Span], give_back: Callable[[Span], None]) -> None:
        self._held = held
        self._give_back = give_back

    def __del__(self) -> None:
        # By the garbage collector too, in any thread and in the middle of anything: this may take no lock.
        for span in self._held:
            self._give_back(span)


class HostCopy:
    """A value on the host: in ``span``, as long as it has a share in the ``consignment``. ``tensor`` will be of
    ``geometry``.

    ``content`` is a tensor over the value's whole storage on the device, None while there is none; of a new one only
    the bytes that travel are filled, the others are for somebody else to write.
    """

    __slots__ = ("__weakref__", "consignment", "content", "device", "freight", "geometry", "span")

    complete = False  # is ``content`` the value's own, all of it, because it never left?

    def __init__(self, freight: Freight, device: torch.device, span: Span, consignment: Consignment) -> None:
        self.freight = freight
        self.geometry = freight.geometry
        self.device = device
        self.span = span
        self.consignment: Consignment | None = consignment
        self.content: torch.Tensor | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The value on the device, after ``fetch``."""
        assert self.content is not None
        return self.content if self.freight.dense else view_of(self.content, self.geometry)


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
        self.copies: list[weakref.ref[Any]] = []  # the engine's own kind of ``HostCopy``
        self.started: Any = None  # when, if somebody traces

    def at_hand(self) -> list[Any]:
        """What is still wanted of what was sent, in order."""
        return [copy for ref in self.copies if (copy := ref()) is not None]


class CopyEngine(Protocol):
    """How swapped values travel.

    ``begin`` is called as a block's forward begins; ``send`` as it ends, with what is to leave, a tensor for each of
    the manifest's freights: these may be dropped then. ``fetch`` is called as its backward begins: after it ``tensor``
    of each copy may be used. ``turn`` is for blocks whose backward begins without anything to fetch. Both give the
    bytes that started on their way back. ``window`` is for how many blocks bytes may be on their way, 0 where they
    never are.
    """

    window: int

    def begin(self, place: int, name: str) -> Stop: ...

    def send(self, stop: Stop, manifest: Manifest, tensors: Sequence[torch.Tensor]) -> Sequence[HostCopy]: ...

    def fetch(self, stop: Stop, copies: Sequence[HostCopy]) -> int: ...

    def turn(self, stop: Stop) -> int: ...
