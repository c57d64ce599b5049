"""Memory logs that tell buffers apart: which free belongs to which allocation.

On the CPU torch's profiler tells addresses in its event tree (the classic backend of ``memory_log`` does not). On CUDA
the caching allocator keeps a history. A dry log (``offload.dry.mode``) follows storages.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stowplan.offload.allocation_record import AllocationRecord, Happening, What
from stowplan.offload.memory_log import NOTE, CpuMemoryLog, CudaMemoryLog, MemoryLog, happenings, profiler_config

__all__ = ["CpuAllocationLog", "CudaAllocationLog", "allocation_log"]


def allocation_log(device: torch.device) -> MemoryLog:
    """The log for ``device``'s allocator that has a ``record`` afterwards."""
    return CpuAllocationLog() if device.type == "cpu" else CudaAllocationLog(device)


class CpuAllocationLog(CpuMemoryLog):
    """torch's profiler with addresses. No other profiler may be active in this thread."""

    def note(self, name: str, tensor: torch.Tensor) -> None:
        with torch.autograd.profiler.record_function(f"{NOTE}{name}@{_address(tensor)}"):
            pass

    def _start(self) -> None:
        profiler = torch._C._profiler
        config, activities = profiler_config(profiler.ProfilerState.KINETO), {profiler.ProfilerActivity.CPU}
        with _quiet_profiler():
            torch._C._autograd._prepare_profiler(config, activities)
            torch._C._autograd._enable_profiler(config, activities)

    def _stop(self) -> list[Happening]:
        result = torch._C._autograd._disable_profiler()
        assert result is not None
        lines = sorted(_lines(result.experimental_event_tree()), key=lambda line: line[0])
        found = happenings((name, address, num_bytes) for _, name, address, num_bytes in lines)
        self.record = AllocationRecord(found)
        return found


def _address(tensor: torch.Tensor) -> int:
    """Where the tensor's storage begins. Asking the storage itself would leave it with one more owner in Python, and
    autograd adds in place only to gradients that have no other.
    """
    return tensor.data_ptr() - int(tensor.storage_offset()) * tensor.element_size()


def _lines(events: Iterable[Any]) -> Iterator[tuple[int, str, int, int]]:
    """Nanoseconds, name, address and bytes of each event in a tree."""
    for event in events:
        fields = event.extra_fields
        if isinstance(fields, torch._C._profiler._ExtraFields_Allocation):
            if str(fields.device) == "cpu":
                yield event.start_time_ns, "", fields.ptr, fields.alloc_size
        else:
            yield event.start_time_ns, event.name, 0, 0
        yield from _lines(event.children)


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Kineto, which some builds of torch let write lines of its own to stderr, reads how much when it first starts."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        del os.environ[name]


class CudaAllocationLog(CudaMemoryLog):
    """The caching allocator's history of requests, beside its counters.

    Bytes are rounded up as the allocator does. A mark reads the length of the history, which takes milliseconds.
    """

    _ROUND_BYTES = 512
    _MOST_ENTRIES = 2**20

    def __enter__(self) -> CudaAllocationLog:
        torch.cuda.memory._record_memory_history("all", context=None, max_entries=self._MOST_ENTRIES)
        self._happenings: list[Happening] = []
        self._num_read = 0
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._read()
        torch.cuda.memory._record_memory_history(None)
        self.record = AllocationRecord(self._happenings)

    def mark(self, name: str) -> None:
        super().mark(name)
        self._read()
        self._happenings.append(Happening(What.MARK, name=name))

    def note(self, name: str, tensor: torch.Tensor) -> None:
        self._read()
        self._happenings.append(Happening(What.NOTE, _address(tensor), name=name))

    def _read(self) -> None:
        """What has come since the last time."""
        index = torch.empty(0, device=self.device).device.index
        history = torch.cuda.memory._snapshot(self.device)["device_traces"][index]
        self._happenings += _from_history(history[self._num_read :], self._ROUND_BYTES)
        self._num_read = len(history)


def _from_history(entries: Iterable[dict[str, Any]], round_bytes: int) -> Iterator[Happening]:
    """Allocations and frees among the entries of a CUDA allocator's history."""
    kinds = {"alloc": What.ALLOCATED, "free_completed": What.FREED}
    for entry in entries:
        if entry["action"] in kinds:
            num_bytes = -(-entry["size"] // round_bytes) * round_bytes
            yield Happening(kinds[entry["action"]], entry["addr"], num_bytes)
