"""Bytes on a CUDA device: torch's counters, or the arena's, as torch's stop where another allocator serves."""

from __future__ import annotations

import torch

from stowplan.offload.arena.installing import cuda_arena

__all__ = ["allocated_bytes", "num_failures", "peak_bytes", "reserved_bytes", "reset_peak"]


def allocated_bytes(device: torch.device) -> int:
    """Alive now."""
    arena = cuda_arena(device)
    if arena is None:
        return torch.cuda.memory_allocated(device)
    counted = arena.stats()
    return int(counted.planned_bytes + counted.fallback_bytes)


def peak_bytes(device: torch.device) -> int:
    """The most that was alive since ``reset_peak``."""
    arena = cuda_arena(device)
    return torch.cuda.max_memory_allocated(device) if arena is None else int(arena.stats().live_peak_bytes)


def reset_peak(device: torch.device) -> None:
    """``peak_bytes`` begins anew."""
    arena = cuda_arena(device)
    if arena is None:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        arena.reset_peak()


def reserved_bytes(device: torch.device) -> int:
    """Taken from the device, in use or not."""
    arena = cuda_arena(device)
    return torch.cuda.memory_reserved(device) if arena is None else int(arena.stats().reserved_bytes)


def num_failures(device: torch.device) -> int:
    """Allocations that failed."""
    arena = cuda_arena(device)
    if arena is None:
        return int(torch.cuda.memory_stats(device).get("num_ooms", 0))
    return int(arena.stats().out_of_memory)
