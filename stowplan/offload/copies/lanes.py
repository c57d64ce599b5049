"""Lanes: queues that run copies in order, beside compute. CUDA streams, or threads on a machine without them.

The protocol of copies (``overlapped``) is written once, for both kinds. A *mark* stands for the end of all that a lane,
or compute, was given before. ``wait`` orders whoever waits after it: a stream waits on the device, and the host goes
on; on the CPU, where compute is the host itself, the host stands still.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import queue
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from stowplan.offload.copies.trace import Trace

__all__ = ["Compute", "CudaLanes", "Lane", "Lanes", "Mark", "Pairs", "ThreadLane", "ThreadLanes", "lanes_for"]

# Destination and source of each copy: tensors of bytes, equally long.
Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
Mark = Any  # of the lanes' own kind


class Lane(Protocol):
    """Runs copies one after the other. ``wait`` holds what comes after it; ``finish`` ends when the lane is idle."""

    name: str

    def wait(self, mark: Mark) -> None: ...

    def copy(self, pairs: Pairs, block: str, trace: Trace | None) -> Mark: ...

    def finish(self) -> None: ...


class Compute(Protocol):
    """The stream that the model runs on. Two of them are equal if they are the same stream."""

    def mark(self) -> Mark: ...

    def wait(self, mark: Mark) -> None: ...

    def stamp(self) -> Any: ...


class Lanes(Protocol):
    """The lanes of one device; ``compute`` is the stream that is current now."""

    to_host: Lane
    to_device: Lane

    def compute(self) -> Compute: ...

    def is_done(self, mark: Mark) -> bool: ...

    def seconds_between(self, start: Any, end: Any) -> float: ...


# ---- threads ---------------------------------------------------------------------------------------------------------
class _ThreadMark:
    """Closed until ``open``; whoever waits hears of the error that the copy ended with."""

    __slots__ = ("_lock", "error")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.error: BaseException | None = None

    def is_done(self) -> bool:
        return not self._lock.locked()

    def open(self, error: BaseException | None) -> None:
        self.error = error
        self._lock.release()

    def wait(self) -> None:
        with self._lock:
            pass
        if self.error is not None:
            raise self.error


class _Job:
    """Copies of one lane that are over together."""

    __slots__ = ("after", "before", "block", "lane", "mark", "pairs", "trace")

    def __init__(
        self,
        lane: str,
        block: str,
        after: list[_ThreadMark],
        pairs: Pairs,
        before: Callable[[Pairs], object] | None,
        trace: Trace | None,
    ) -> None:
        self.lane = lane
        self.block = block
        self.after = after
        self.pairs = pairs
        self.before = before
        self.trace = trace
        self.mark = _ThreadMark()

    def run(self) -> None:
        error = None
        try:
            for mark in self.after:
                mark.wait()
            self._copy()
        except BaseException as raised:  # noqa: BLE001 (raised again by whoever waits)
            traceback.clear_frames(raised.__traceback__)
            error = raised
        # Memory is freed by whoever waits, never here: the CPU's log of allocations cannot see this thread.
        self.pairs = self.after = ()  # type: ignore[assignment]
        self.mark.open(error)

    def _copy(self) -> None:
        if self.before is not None:
            self.before(self.pairs)
        start = time.perf_counter()
        for destination, source in self.pairs:
            num_bytes = source.numel()
            assert destination.numel() == num_bytes
            # Not torch's copy_: that would start a pool of threads for this one, too.
            ctypes.memmove(destination.data_ptr(), source.data_ptr(), num_bytes)
        if self.trace is not None:
            self.trace.add(self.lane, self.block, "copy", start, time.perf_counter())


class ThreadLane:
    """A thread that copies. It starts with the first copy and ends when the lane is dropped.

    ``before`` is called in the thread before each job's copies: tests delay them by it.
    """

    def __init__(self, name: str, before: Callable[[Pairs], object] | None = None) -> None:
        self.name = name
        self.before = before
        self._after: list[_ThreadMark] = []
        self._unfinished: deque[_Job] = deque()
        self._jobs: queue.SimpleQueue[_Job | None] | None = None
        _lanes.add(self)

    def wait(self, mark: _ThreadMark | None) -> None:
        """None is a mark of compute: on the CPU all that it was given is done."""
        if mark is not None:
            self._after.append(mark)

    def copy(self, pairs: Pairs, block: str, trace: Trace | None) -> _ThreadMark:
        job = _Job(self.name, block, self._after, pairs, self.before, trace)
        self._after = []
        self._unfinished.append(job)
        if self._jobs is None:
            self._start()
        else:
            self._jobs.put(job)
        return job.mark

    def _start(self) -> None:
        """Begin with what is unfinished."""
        jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs = jobs
        for job in tuple(self._unfinished):
            jobs.put(job)
        self._thread = threading.Thread(target=_work, args=(jobs, self._unfinished), name=self.name, daemon=True)
        self._thread.start()
        weakref.finalize(self, jobs.put, None).atexit = False

    def finish(self) -> None:
        """Nothing to wait for: a job holds the memory that it copies."""

    def close(self) -> None:
        """End the thread, after what it was given."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None
            self._thread.join()

    def start_anew_after_fork(self) -> None:
        """In a forked child, which has this lane but not its thread."""
        self._jobs = None
        if self._unfinished:
            self._start()


def _work(jobs: queue.SimpleQueue[_Job | None], unfinished: deque[_Job]) -> None:
    while (job := jobs.get()) is not None:
        if not job.mark.is_done():
            job.run()
        unfinished.popleft()
        del job


_lanes: weakref.WeakSet[ThreadLane] = weakref.WeakSet()


def _close_all() -> None:
    """A daemon thread that is in native code as the interpreter ends would take the process down."""
    for lane in list(_lanes):
        lane.close()


def _start_anew_all() -> None:
    for lane in list(_lanes):
        lane.start_anew_after_fork()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_all)


class _Host:
    """Compute on the CPU: whatever it was given is done."""

    def mark(self) -> None:
        return None

    def wait(self, mark: _ThreadMark) -> None:
        mark.wait()

    def stamp(self) -> float:
        return time.perf_counter()


class ThreadLanes:
    """Two threads beside the CPU's own computing."""

    def __init__(
        self,
        before_to_host: Callable[[Pairs], object] | None = None,
        before_to_device: Callable[[Pairs], object] | None = None,
    ) -> None:
        self.to_host: Lane = ThreadLane("to host", before_to_host)
        self.to_device: Lane = ThreadLane("to device", before_to_device)
        self._compute = _Host()

    def compute(self) -> Compute:
        return self._compute

    def is_done(self, mark: _ThreadMark) -> bool:
        return mark.is_done()

    def seconds_between(self, start: float, end: float) -> float:
        return end - start


# ---- CUDA ------------------------------------------------------------------------------------------------------------
class _CudaLane:
    """A stream of its own."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self._stream = torch.cuda.Stream(device)

    def wait(self, mark: torch.cuda.Event) -> None:
        self._stream.wait_event(mark)

    def copy(self, pairs: Pairs, block: str, trace: Trace | None) -> torch.cuda.Event:
        start = None if trace is None else self._event(timed=True)
        with torch.cuda.stream(self._stream):
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        end = self._event(timed=trace is not None)
        if trace is not None:
            trace.add(self.name, block, "copy", start, end)
        return end

    def _event(self, timed: bool) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=timed)
        event.record(self._stream)
        return event

    def finish(self) -> None:
        self._stream.synchronize()


class _CudaCompute:
    """The model's stream."""

    __slots__ = ("_stream",)

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CudaCompute) and self._stream == other._stream

    def __hash__(self) -> int:
        return hash(self._stream)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        self._stream.wait_event(mark)

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


class CudaLanes:
    """Two streams beside the model's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.to_host: Lane = _CudaLane("to host", device)
        self.to_device: Lane = _CudaLane("to device", device)

    def compute(self) -> Compute:
        return _CudaCompute(torch.cuda.current_stream(self._device))

    def is_done(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())

    def seconds_between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        start.synchronize()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def lanes_for(device: torch.device) -> Lanes:
    """The lanes of ``device``."""
    return CudaLanes(device) if device.type == "cuda" else ThreadLanes()
