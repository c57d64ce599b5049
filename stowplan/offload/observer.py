"""What can be seen of a device's memory while training runs, at next to no cost.

On CUDA the caching allocator counts as it goes. On the CPU nothing counts unless somebody measures
(``offload.measure``), so there is nothing to be seen.
"""

from __future__ import annotations

from typing import Protocol

import torch

from stowplan.offload import cuda_memory

__all__ = ["CudaObserver", "MemoryObserver", "Unobserved", "is_allocation_failure", "memory_observer"]

# How torch's allocators begin where they do not raise torch.OutOfMemoryError.
_FAILURES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
)


class MemoryObserver(Protocol):
    """Looks at one device's allocator. All bytes are of live tensors and scratch, not of what is reserved."""

    def peak_bytes(self) -> int | None:
        """The highest live bytes since ``forget``; None where nobody counts."""

    def forget(self) -> None:
        """Begin to look for a peak anew."""

    def num_failures(self) -> int:
        """Allocations that failed since the process began."""


class Unobserved:
    """A device whose memory nobody counts."""

    def peak_bytes(self) -> int | None:
        return None

    def forget(self) -> None:
        """Nothing was seen."""

    def num_failures(self) -> int:
        return 0


class CudaObserver:
    """The caching allocator's statistics. ``forget`` resets its peaks, which others may read, too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def peak_bytes(self) -> int | None:
        return cuda_memory.peak_bytes(self.device)

    def forget(self) -> None:
        cuda_memory.reset_peak(self.device)

    def num_failures(self) -> int:
        return cuda_memory.num_failures(self.device)


def memory_observer(device: torch.device) -> MemoryObserver:
    """The observer for ``device``."""
    return CudaObserver(device) if device.type == "cuda" else Unobserved()


def is_allocation_failure(error: BaseException) -> bool:
    """Is this an allocator that has no memory left, on the device or the host?"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _FAILURES)
