"""One piece of host memory, taken once, that holds all swapped values."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from stowplan.core.units import format_bytes
from stowplan.offload import numa

__all__ = ["HostSlab", "Layout", "Span", "Taken", "page_lock"]

_ALIGNMENT = 64


class Span(NamedTuple):
    """``size_bytes`` host bytes from ``address``: in the slab from ``start``, or (``overflow``) a buffer of their own
    beside it.
    """

    start: int
    size_bytes: int
    address: int
    overflow: torch.Tensor | None = None


class Layout:
    """Sizes in bytes that are taken together: each at a multiple of 64, side by side where there is room.

    It may be taken any number of times; who does so again and again makes it once.
    """

    __slots__ = ("_latest", "needs", "sizes", "total_bytes")

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.needs = tuple(map(_aligned, sizes))
        self.total_bytes = sum(self.needs)
        self._latest: tuple[int, tuple[Span, ...]] = (-1, ())

    def spans_from(self, start: int, address: int) -> tuple[Span, ...]:
        """A span for each size, side by side."""
        latest = self._latest
        if latest[0] != address:  # a training step takes the same place as the one before
            before = [0, *itertools.accumulate(self.needs[:-1])]
            spans = tuple(Span(start + n, size, address + n) for n, size in zip(before, self.sizes, strict=False))
            latest = self._latest = address, spans
        return latest[1]


class Taken(NamedTuple):
    """A span for each size of a layout, and what is to be given back in their place: one span, or as many."""

    spans: Sequence[Span]
    held: Sequence[Span]


class _Hole(NamedTuple):
    """Free bytes of the slab."""

    start: int
    size_bytes: int


class HostSlab:
    """Host bytes, first fit, holes joined.

    The memory comes from the system, not from torch's CPU allocator: on a CPU-only machine it stands in for the
    host and must not count as device memory. Pages are touched at first use. For a CUDA ``device`` it is page-locked,
    in memory that is near to the device where there is a choice. What does not fit (more forward passes in flight than
    planned) gets a buffer of its own, with a warning.
    """

    def __init__(self, size_bytes: int, device: torch.device | None = None) -> None:
        self.size_bytes = _aligned(max(size_bytes, _ALIGNMENT))
        self.overflow_bytes = 0
        self._device = device
        self._bytes = _host_bytes(self.size_bytes, device)
        self._address = self._bytes.data_ptr()
        self._holes = [_Hole(0, self.size_bytes)]
        # What was given back and is not joined to the holes yet. A value may be given back while the garbage collector
        # runs in the middle of ``take``, or by a thread of autograd: appending is all that ``give_back`` does.
        self._returned: deque[Span] = deque()
        self._at_work = threading.Lock()  # for the holes; nothing that the collector may call takes it

    @property
    def used_bytes(self) -> int:
        with self._at_work:
            self._join_returned()
            return self.size_bytes - sum(hole.size_bytes for hole in self._holes)

    def take(self, size_bytes: int) -> Span:
        """Reserve ``size_bytes``."""
        return self.take_all(Layout((size_bytes,))).spans[0]

    def take_all(self, layout: Layout) -> Taken:
        """Reserve a span for each of the layout's sizes: in one piece, or wherever each fits."""
        if not layout.total_bytes:
            return Taken(layout.spans_from(0, self._address), ())
        with self._at_work:
            self._join_returned()
            start = self._carve(layout.total_bytes)
            if start >= 0:
                address = self._address + start
                return Taken(layout.spans_from(start, address), (Span(start, layout.total_bytes, address),))
            starts = [self._carve(need) for need in layout.needs]
        spans: list[Span | None] = [
            Span(start, size, self._address + start) if start >= 0 else None
            for start, size in zip(starts, layout.sizes, strict=True)
        ]
        try:
            taken = [span or self._beside(size) for span, size in zip(spans, layout.sizes, strict=True)]
        except BaseException:  # the host is full, too
            for span in filter(None, spans):
                self.give_back(span)
            raise
        beside = sum(need for start, need in zip(starts, layout.needs, strict=True) if start < 0)
        if beside:
            self._tell_of_overflow(beside)
        return Taken(taken, taken)

    def _beside(self, size_bytes: int) -> Span:
        overflow = _host_bytes(_aligned(size_bytes), self._device)
        return Span(-1, size_bytes, overflow.data_ptr(), overflow)

    def _carve(self, need: int) -> int:
        """Where so many bytes fit, -1 if nowhere."""
        if not need:
            return 0
        hole = self._first_hole(need)
        if hole is None:
            return -1
        start, size = self._holes[hole]
        self._holes[hole : hole + 1] = [_Hole(start + need, size - need)] if size > need else []
        return start

    def _first_hole(self, size_bytes: int) -> int | None:
        return next((i for i, hole in enumerate(self._holes) if hole.size_bytes >= size_bytes), None)

    def _tell_of_overflow(self, num_bytes: int) -> None:
        first = not self.overflow_bytes
        self.overflow_bytes += num_bytes
        if first:
            warnings.warn(
                f"the host slab of {format_bytes(self.size_bytes)} is full: swapped values now take host memory beyond "
                f"the plan. More forward passes are in flight than were planned for, or the batch has grown.",
                RuntimeWarning,
                stacklevel=3,
            )

    def view(self, span: Span) -> torch.Tensor:
        """The span's bytes."""
        if span.overflow is not None:
            return span.overflow[: span.size_bytes]
        return self._bytes[span.start : span.start + span.size_bytes]

    def give_back(self, span: Span) -> None:
        """Free a span that ``take`` gave."""
        if span.overflow is None and span.size_bytes:
            self._returned.append(span)

    def _join_returned(self) -> None:
        if not self._returned:
            return
        holes = self._holes
        while self._returned:
            span = self._returned.popleft()
            holes.append(_Hole(span.start, _aligned(span.size_bytes)))
        holes.sort()
        joined = [holes[0]]
        for hole in holes[1:]:
            last = joined[-1]
            if last.start + last.size_bytes == hole.start:
                joined[-1] = _Hole(last.start, last.size_bytes + hole.size_bytes)
            else:
                joined.append(hole)
        self._holes = joined


def _host_bytes(size_bytes: int, device: torch.device | None) -> torch.Tensor:
    """Memory from the system; for a CUDA device on the device's node, and page-locked.

    Not by torch's ``pin_memory``: its allocator rounds up to a power of two and never gives anything back.
    """
    # A forked child has its own copy, or it would write into what the parent holds. Pinned pages must not be copied.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if device is None else {}
    tensor = torch.frombuffer(mmap.mmap(-1, size_bytes, **private), dtype=torch.uint8)
    if device is not None:
        node = numa.node_of(device)
        if node is not None:
            numa.prefer(tensor, node)
        weakref.finalize(tensor, page_lock(tensor.data_ptr(), size_bytes))
    return tensor


def page_lock(address: int, size_bytes: int) -> Callable[[], object]:
    """Page-lock host memory for CUDA's copies; gives what unlocks it. Raises RuntimeError."""
    runtime = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(address, size_bytes, 0))
    if status:
        _forget_last_error(runtime)
        raise RuntimeError(f"cudaHostRegister of {format_bytes(size_bytes)} failed with CUDA error {status}")
    return partial(runtime.cudaHostUnregister, address)


def _forget_last_error(runtime: Any) -> None:
    """Take back the error that a failed call leaves, which the check of the next kernel's launch would raise."""
    if hasattr(runtime, "cudaGetLastError"):
        runtime.cudaGetLastError()
        return
    with contextlib.suppress(RuntimeError):  # a launch of our own
        torch.ones(1, device="cuda")


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
