"""What the planner knows of a machine: its memory, its speed, and how it copies to the host."""

from __future__ import annotations

from dataclasses import dataclass

from stowplan.core.errors import InvalidArgument
from stowplan.core.units import GIB

__all__ = ["PRESETS", "Hardware", "preset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device and its link to the host.

    ``overlapped_copies`` says whether copies run beside compute (on streams of their own, through ``staging_blocks``
    rounds of device buffers as in MEMO, arXiv 2407.12117, section 4.2) or stop it. CUDA devices overlap; on the CPU,
    where a copy takes a core and memory bandwidth from compute, copies stop it unless a description says otherwise.
    ``origin`` is "measured" or where the figures are from.
    """

    name: str
    device_type: str
    device_bytes: int
    matmul_flops_per_second: float
    memory_bytes_per_second: float
    to_host_bytes_per_second: float
    to_device_bytes_per_second: float
    overlapped_copies: bool = False
    staging_blocks: int = 2
    origin: str = "measured"
    host_bytes: int = 0  # of host memory for each device; 0: not known


# Data sheets: dense bf16 FLOP/s and memory bandwidth of the vendor; links at a usual pinned-copy rate. Host memory as
# in usual machines of eight: 2 TB, less what others take.
PRESETS = {
    "h100-sxm": Hardware(
        name="h100-sxm",
        device_type="cuda",
        device_bytes=80 * GIB,
        matmul_flops_per_second=989e12,
        memory_bytes_per_second=3.35e12,
        to_host_bytes_per_second=50e9,
        to_device_bytes_per_second=50e9,
        overlapped_copies=True,
        origin="data sheet",
        host_bytes=200 * GIB,
    ),
    "h200-sxm": Hardware(
        name="h200-sxm",
        device_type="cuda",
        device_bytes=141 * 10**9,
        matmul_flops_per_second=989e12,
        memory_bytes_per_second=4.8e12,
        to_host_bytes_per_second=50e9,
        to_device_bytes_per_second=50e9,
        overlapped_copies=True,
        origin="data sheet",
        host_bytes=200 * GIB,
    ),
    "a100-sxm": Hardware(
        name="a100-sxm",
        device_type="cuda",
        device_bytes=80 * GIB,
        matmul_flops_per_second=312e12,
        memory_bytes_per_second=2.04e12,
        to_host_bytes_per_second=25e9,
        to_device_bytes_per_second=25e9,
        overlapped_copies=True,
        origin="data sheet",
        host_bytes=200 * GIB,
    ),
}


def preset(name: str) -> Hardware:
    """The data-sheet description called ``name``. Raises InvalidArgument naming those there are."""
    try:
        return PRESETS[name.lower()]
    except KeyError:
        raise InvalidArgument(f"hardware={name!r} is not known; allowed: {', '.join(sorted(PRESETS))}.") from None
