"""Which memory of the host is near to a GPU, on machines with several nodes.

Nothing here may fail a run: where the system does not say, or does not do as it is asked, memory is where it happens to
be, and copies are slower.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch

__all__ = ["node_of", "node_of_pci", "prefer"]

# Linux: numbers of the system call, and the policy that takes another node's memory where the preferred one is full.
_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_PREFERRED = 1
_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


def node_of(device: torch.device) -> int | None:
    """The memory node that the CUDA ``device`` is attached to; None where there is one node only, or none is known."""
    properties = torch.cuda.get_device_properties(device)
    domain, bus, slot = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    if domain is None or bus is None or slot is None:
        return None
    return node_of_pci(f"{domain:04x}:{bus:02x}:{slot:02x}.0")


def node_of_pci(address: str, root: Path = Path("/sys")) -> int | None:
    """The node of the PCI device at ``address`` (``"0000:3b:00.0"``); None where there is no choice."""
    if not (root / "devices/system/node/node1").exists():
        return None
    try:
        node = int((root / "bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def prefer(memory: torch.Tensor, node: int) -> bool:
    """Have the pages of ``memory`` (whole ones, not touched yet) come from ``node``; False if that cannot be had."""
    number = _MBIND.get(platform.machine())
    if platform.system() != "Linux" or number is None:
        return False
    mask = (ctypes.c_ulong * (node // _BITS + 1))()
    mask[node // _BITS] = 1 << node % _BITS
    system = ctypes.CDLL(None, use_errno=True)
    arguments = (memory.data_ptr(), memory.numel(), _MPOL_PREFERRED, ctypes.addressof(mask), len(mask) * _BITS + 1, 0)
    failed: int = system.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, arguments))
    return failed == 0
