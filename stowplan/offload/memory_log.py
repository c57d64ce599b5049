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

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from stowplan.core.errors import InvalidArgument
from stowplan.offload import cuda_memory

__all__ = ["CpuMemoryLog", "CudaMemoryLog", "MemoryLog", "Segment", "memory_log", "synchronize"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Live bytes between two marks, above what was alive when the log began."""

    name: str
    start_bytes: int
    peak_bytes: int
    end_bytes: int


class MemoryLog(Protocol):
    """Live bytes of one device while open. ``mark`` ends a segment and begins the next; ``segments`` is for after."""

    segments: list[Segment]

    def __enter__(self) -> MemoryLog: ...

    def __exit__(self, *exception: object) -> None: ...

    def mark(self, name: str) -> None: ...

    def freed(self, num_bytes: int) -> None: ...


def memory_log(device: torch.device) -> MemoryLog:
    """The log for ``device``'s allocator."""
    return CpuMemoryLog() if device.type == "cpu" else CudaMemoryLog(device)


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish, where it runs ahead of the host."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


_MARK = "stowplan::mark::"
_FREED = "stowplan::freed::"


class CpuMemoryLog:
    """torch's profiler memory events. No other profiler may be active in this thread."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def __enter__(self) -> CpuMemoryLog:
        if torch._C._autograd._profiler_enabled():
            raise InvalidArgument(
                "a torch profiler (or another stowplan.measure) is active in this thread, and live bytes on the CPU "
                "are read from the same events: end it first. With wrap(), run the step that plans before measuring."
            )
        profiler = torch._C._profiler
        config = profiler.ProfilerConfig(
            profiler.ProfilerState.CPU, False, True, False, False, False, profiler._ExperimentalConfig()
        )
        torch._C._autograd._enable_profiler_legacy(config)
        self.mark("start")
        return self

    def __exit__(self, *exception: object) -> None:
        self.segments = _read_segments(torch._C._autograd._disable_profiler_legacy())

    def mark(self, name: str) -> None:
        with torch.autograd.profiler.record_function(_MARK + name):
            pass

    def freed(self, num_bytes: int) -> None:
        """Memory from before the log has gone."""
        with torch.autograd.profiler.record_function(f"{_FREED}{num_bytes}"):
            pass


def _read_segments(threads: list[list[Any]]) -> list[Segment]:
    """Fold the profiler's events, thread by thread in order of time, into segments."""
    events = [event for thread in threads for event in thread]
    if len(threads) > 1:
        origin = threads[0][0]
        events.sort(key=lambda event: float(origin.cpu_elapsed_us(event)))
    segments: list[Segment] = []
    name, live, start, peak = "", 0, 0, 0
    announced = 0  # by ``freed``; the allocator tells it once more if an earlier log saw the allocation
    for event in events:
        if event.kind() == "memory_alloc":
            num_bytes = event.cpu_memory_usage()
            if num_bytes != -announced:
                live += num_bytes
                peak = max(peak, live)
            announced = 0
        elif event.kind() == "push" and event.name().startswith(_MARK):
            if name:
                segments.append(Segment(name, start, peak, live))
            name, start, peak = event.name()[len(_MARK) :], live, live
        elif event.kind() == "push" and event.name().startswith(_FREED):
            announced = int(event.name()[len(_FREED) :])
            live -= announced
    segments.append(Segment(name, start, peak, live))
    return segments


class CudaMemoryLog:
    """The caching allocator's counters of allocated (not reserved) bytes."""

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

    def _end_segment(self) -> None:
        live = cuda_memory.allocated_bytes(self.device)
        peak = cuda_memory.peak_bytes(self.device)
        origin = self._origin
        self.segments.append(Segment(self._name, self._start - origin, peak - origin, live - origin))
        self._start = live
        cuda_memory.reset_peak(self.device)
