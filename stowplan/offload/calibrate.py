"""Measuring the machine at hand: link speeds and rough compute rates, and how much memory there is to plan with."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from stowplan.core.errors import InvalidArgument, MissingDependency
from stowplan.core.hardware import Hardware
from stowplan.core.host_memory import available_bytes, memory_limit_bytes
from stowplan.core.units import GIB, MIB
from stowplan.offload import cuda_memory
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.memory_log import synchronize
from stowplan.offload.storages import content_of

__all__ = ["RESERVE_BYTES", "device_budget_bytes", "host_budget_bytes", "measure_hardware"]

# Kept free of budget="auto": allocator fragmentation, library workspaces, NCCL buffers.
RESERVE_BYTES = GIB
# Share of the free host memory that host_budget="auto" leaves to data loaders, page cache and other processes.
_HOST_RESERVE = 0.2
_PROBE_BYTES = 64 * MIB
_PROBE_WIDTH = 1024


def measure_hardware(device: torch.device) -> Hardware:
    """Describe ``device`` by a few short probes (well under a second)."""
    slab = HostSlab(_PROBE_BYTES, device if device.type == "cuda" else None)
    host = slab.view(slab.take(_PROBE_BYTES))
    probe = torch.ones(_PROBE_BYTES // 4, device=device)
    content = content_of(probe)
    square = torch.ones(_PROBE_WIDTH, _PROBE_WIDTH, device=device)
    return Hardware(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        device_type=device.type,
        device_bytes=_device_bytes(device),
        matmul_flops_per_second=2 * _PROBE_WIDTH**3 / _median_seconds(lambda: square @ square, device),
        memory_bytes_per_second=2 * _PROBE_BYTES / _median_seconds(lambda: probe.add_(1), device),
        to_host_bytes_per_second=_PROBE_BYTES / _median_seconds(lambda: host.copy_(content), device),
        to_device_bytes_per_second=_PROBE_BYTES
        / _median_seconds(lambda: torch.empty_like(content).copy_(host), device),
        overlapped_copies=device.type == "cuda",
    )


def _median_seconds(action: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[1]


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_limit_bytes()


def device_budget_bytes(device: torch.device) -> int:
    """``budget="auto"``: what this process may still allocate on ``device``, less ``RESERVE_BYTES``.

    On CUDA NVML says what is free; what torch has reserved already counts as ours. On the CPU it is the memory that is
    available within the cgroup's limit, and what the model holds already counts as ours.

    Raises MissingDependency if NVML's Python package is missing, InvalidArgument if nothing is left.
    """
    if device.type == "cuda":
        usable = _nvml_free_bytes(device) + cuda_memory.reserved_bytes(device)
    else:
        usable = available_bytes() + psutil.Process().memory_info().rss
    budget = usable - RESERVE_BYTES
    if budget <= 0:
        raise InvalidArgument(
            f'budget="auto" finds {usable} bytes on {device}, which is less than the reserve of {RESERVE_BYTES}; free '
            f"memory, or say budget= in bytes."
        )
    return budget


def _nvml_free_bytes(device: torch.device) -> int:
    try:
        import pynvml
    except ImportError:
        raise MissingDependency(
            'budget="auto" on CUDA needs NVML: pip install "stowplan[cuda]", or say budget= in bytes.'
        ) from None
    free_by_driver, _ = torch.cuda.mem_get_info(device)
    try:
        pynvml.nvmlInit()
        try:
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            free = int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).free)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return int(free_by_driver)  # a slice of a card (MIG), or no NVML library: the driver's word is all there is
    return min(free, int(free_by_driver))


def host_budget_bytes() -> int:
    """``host_budget="auto"``: available host memory within the cgroup's limit, less a fifth for everything else."""
    return int(available_bytes() * (1 - _HOST_RESERVE))
