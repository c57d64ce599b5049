"""What capture measures with: on the device itself, or dry (``offload.dry``), where nothing is computed."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from stowplan.offload.allocation_log import allocation_log
from stowplan.offload.memory_log import MemoryLog, memory_log, synchronize
from stowplan.offload.tape.tape import TapeOp

__all__ = ["Instruments", "RealInstruments"]


class Instruments(Protocol):
    """A memory log and a clock of one device.

    ``dry``: tensors hold no data, so that nothing can be proved, and repeating a measurement gives the same again.
    ``allocations``: each request of memory is asked for, so logs must have a record of them.
    """

    device: torch.device
    dry: bool
    allocations: bool
    scale: float  # real seconds for each of the clock's, as far as it is known by now
    resident_bytes: int  # that libraries hold all step and the memory log does not see

    def memory_log(self) -> MemoryLog:
        """A log of the device's live bytes, to be entered."""

    def seconds(self) -> float:
        """The device's clock, once all that was asked for is done."""

    def observe(self, op: TapeOp) -> None:
        """Called when a recorder has recorded ``op``, which has just run."""

    def block_seconds(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], estimate: tuple[float, float]
    ) -> tuple[float, float]:
        """Seconds of a block's forward and backward, given what the clock said of them."""


class RealInstruments:
    """The device's allocator and the wall clock."""

    dry = False
    scale = 1.0
    resident_bytes = 0

    def __init__(self, device: torch.device, *, allocations: bool = False) -> None:
        self.device = device
        self.allocations = allocations

    def memory_log(self) -> MemoryLog:
        return allocation_log(self.device) if self.allocations else memory_log(self.device)

    def seconds(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def observe(self, op: TapeOp) -> None:
        """Nothing: ops are timed when they are proved."""

    def block_seconds(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], estimate: tuple[float, float]
    ) -> tuple[float, float]:
        return estimate
