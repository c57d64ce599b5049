"""Watching the live bytes of the device's allocator, moment by moment.

On the CPU the truth is torch's own profiler: the allocator reports every allocation and free to it, including scratch
inside kernels, in order. (The classic profiler backend: it is silent and keeps the order; its overhead is that of
recording operator names.) On CUDA the caching allocator's own counters serve.

Note: what the CPU log cannot see
    Frees of memory that was allocated while no log was open are not reported, and neither are allocations in threads
    that the profiler does not follow. So whoever watches holds on to what was there before, or says when it goes
    (``MemoryLog.freed``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, Self

import torch

from stowplan.core.errors import InvalidArgument
from stowplan.offload import cuda_memory
from stowplan.offload.allocation_record import AllocationRecord, Happening, Segment, What, segments_of

__all__ = [
    "NOTE",
    "CpuMemoryLog",
    "CudaMemoryLog",
    "MemoryLog",
    "Segment",
    "happenings",
    "memory_log",
    "profiler_config",
    "synchronize",
]


class MemoryLog(Protocol):
    """Live bytes of one device while open. ``mark`` ends a segment and begins the next; ``segments`` is for after.

    Logs that tell buffers apart have a ``record`` afterwards, in which buffers have the names that ``note`` gave them.
    """

    segments: list[Segment]
    record: AllocationRecord | None

    def __enter__(self) -> MemoryLog: ...

    def __exit__(self, *exception: object) -> None: ...

    def mark(self, name: str) -> None: ...

    def freed(self, num_bytes: int) -> None: ...

    def note(self, name: str, tensor: torch.Tensor) -> None: ...


def memory_log(device: torch.device) -> MemoryLog:
    """The log for ``device``'s allocator."""
    return CpuMemoryLog() if device.type == "cpu" else CudaMemoryLog(device)


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish, where it runs ahead of the host."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


_MARK = "stowplan::mark::"
_FREED = "stowplan::freed::"
NOTE = "stowplan::note::"


class CpuMemoryLog:
    """torch's profiler memory events. No other profiler may be active in this thread."""

    record: AllocationRecord | None = None

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def __enter__(self) -> Self:
        if torch._C._autograd._profiler_enabled():
            raise InvalidArgument(
                "a torch profiler (or another stowplan.measure) is active in this thread, and live bytes on the CPU "
                "are read from the same events: end it first. With wrap(), run the step that plans before measuring."
            )
        self._start()
        self.mark("start")
        return self

    def __exit__(self, *exception: object) -> None:
        self.segments = segments_of(self._stop())

    def mark(self, name: str) -> None:
        with torch.autograd.profiler.record_function(_MARK + name):
            pass

    def freed(self, num_bytes: int) -> None:
        """Memory from before the log has gone."""
        with torch.autograd.profiler.record_function(f"{_FREED}{num_bytes}"):
            pass

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Nothing: this log does not tell buffers apart."""

    def _start(self) -> None:
        torch._C._autograd._enable_profiler_legacy(profiler_config(torch._C._profiler.ProfilerState.CPU))

    def _stop(self) -> list[Happening]:
        """End profiling. Gives the profiler's events of all threads in order of time."""
        threads: list[list[Any]] = torch._C._autograd._disable_profiler_legacy()
        events = [event for thread in threads for event in thread]
        if len(threads) > 1:
            origin = threads[0][0]
            events.sort(key=lambda event: float(origin.cpu_elapsed_us(event)))
        told = [
            (event.name(), 0, event.cpu_memory_usage() if event.kind() == "memory_alloc" else 0)
            for event in events
            if event.kind() in ("memory_alloc", "push")
        ]
        return happenings(told)


def profiler_config(state: Any) -> Any:
    """Memory events, and names of marks, and nothing else."""
    profiler = torch._C._profiler
    return profiler.ProfilerConfig(state, False, True, False, False, False, profiler._ExperimentalConfig())


def happenings(told: Iterable[tuple[str, int, int]]) -> list[Happening]:
    """What a profiler's events say: name, address and bytes of each (below 0: freed; 0: no memory event)."""
    found: list[Happening] = []
    announced = 0  # by ``freed``; the allocator tells it once more if an earlier log saw the allocation
    for name, address, num_bytes in told:
        if num_bytes:
            if num_bytes > 0:
                found.append(Happening(What.ALLOCATED, address, num_bytes))
            elif num_bytes != -announced:
                found.append(Happening(What.FREED, address, -num_bytes))
            announced = 0
        elif name.startswith(_MARK):
            found.append(Happening(What.MARK, name=name.removeprefix(_MARK)))
        elif name.startswith(NOTE):
            noted, _, place = name.removeprefix(NOTE).rpartition("@")
            found.append(Happening(What.NOTE, int(place), name=noted))
        elif name.startswith(_FREED):
            announced = int(name.removeprefix(_FREED))
            found.append(Happening(What.FREED, num_bytes=announced))
    return found


class CudaMemoryLog:
    """The caching allocator's counters of allocated (not reserved) bytes."""

    record: AllocationRecord | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.segments: list[Segment] = []

    def __enter__(self) -> CudaMemoryLog:
        self._origin = self._start = cuda_memory.allocated_bytes(self.device)
        self._name = "start"
        cuda_memory.reset_peak(self.device)
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_segment()

    def mark(self, name: str) -> None:
        self._end_segment()
        self._name = name

    def freed(self, num_bytes: int) -> None:
        """Nothing to add: the counters see every free."""

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Nothing: counters do not tell buffers apart."""

    def _end_segment(self) -> None:
        live = cuda_memory.allocated_bytes(self.device)
        peak = cuda_memory.peak_bytes(self.device)
        origin = self._origin
        self.segments.append(Segment(self._name, self._start - origin, peak - origin, live - origin))
        self._start = live
        cuda_memory.reset_peak(self.device)
