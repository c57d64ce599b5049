"""One piece of host memory, taken once, that holds all swapped values."""

from __future__ import annotations

import mmap
import threading
import warnings
import weakref
from bisect import insort
from collections import deque
from typing import NamedTuple

import torch

from stowplan.core.units import format_bytes
from stowplan.offload import numa

__all__ = ["HostSlab", "Span"]

_ALIGNMENT = 64


class Span(NamedTuple):
    """``size_bytes`` host bytes: in the slab from ``start``, or (``overflow``) a buffer of their own beside it."""

    start: int
    size_bytes: int
    overflow: torch.Tensor | None = None


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
        self._holes = [Span(0, self.size_bytes)]
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
        """Reserve ``size_bytes`` (rounded up to 64 in the slab)."""
        if not size_bytes:
            return Span(0, 0)
        need = _aligned(size_bytes)
        with self._at_work:
            self._join_returned()
            for i, hole in enumerate(self._holes):
                if hole.size_bytes >= need:
                    rest = Span(hole.start + need, hole.size_bytes - need)
                    self._holes[i : i + 1] = [rest] if rest.size_bytes else []
                    return Span(hole.start, size_bytes)
        if not self.overflow_bytes:
            warnings.warn(
                f"the host slab of {format_bytes(self.size_bytes)} is full: swapped values now take host memory beyond "
                f"the plan. More forward passes are in flight than were planned for, or the batch has grown.",
                RuntimeWarning,
                stacklevel=2,
            )
        self.overflow_bytes += need
        return Span(-1, size_bytes, _host_bytes(need, self._device))

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
        while self._returned:
            span = self._returned.popleft()
            insort(self._holes, Span(span.start, _aligned(span.size_bytes)))
            joined: list[Span] = []
            for hole in self._holes:
                if joined and joined[-1].start + joined[-1].size_bytes == hole.start:
                    joined[-1] = Span(joined[-1].start, joined[-1].size_bytes + hole.size_bytes)
                else:
                    joined.append(hole)
            self._holes = joined


def _host_bytes(size_bytes: int, device: torch.device | None) -> torch.Tensor:
    """Memory from the system; for a CUDA device on the device's node, and page-locked.

    Not by torch's ``pin_memory``: its allocator rounds up to a power of two and never gives anything back.
    """
    tensor = torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)
    if device is not None:
        node = numa.node_of(device)
        if node is not None:
            numa.prefer(tensor, node)
        address, runtime = tensor.data_ptr(), torch.cuda.cudart()
        status = int(runtime.cudaHostRegister(address, size_bytes, 0))
        if status:
            raise RuntimeError(f"cudaHostRegister of {format_bytes(size_bytes)} failed with CUDA error {status}")
        weakref.finalize(tensor, runtime.cudaHostUnregister, address)
    return tensor


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
