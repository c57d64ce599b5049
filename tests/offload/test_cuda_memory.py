"""Counters of a CUDA device that an arena serves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stowplan.arena import _packed
from stowplan.offload import cuda_memory
from stowplan.offload.arena import installing
from stowplan.offload.arena.learning import Learner
from stowplan.offload.memory_log import CudaMemoryLog, Segment
from tests.offload.arena.device import MIB, Device


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = Device(100 * MIB)
    installed = installing._Installed(f"cuda:{made.number}", made.arena, Learner(made.arena, _packed, 512, 8), None)
    monkeypatch.setattr(installing._Process, "installed", installed)
    yield made
    installed._hook.remove()


def test_counters_are_the_arenas(device: Device) -> None:
    where = torch.device("cuda", device.number)
    cuda_memory.reset_peak(where)
    first, second = device.allocate(2 * MIB), device.allocate(3 * MIB)
    assert first is not None
    assert second is not None
    device.free(first)
    assert cuda_memory.allocated_bytes(where) == 3 * MIB
    assert cuda_memory.peak_bytes(where) == 5 * MIB
    assert cuda_memory.reserved_bytes(where) == 20 * MIB
    cuda_memory.reset_peak(where)
    assert cuda_memory.peak_bytes(where) == 3 * MIB
    assert device.allocate(200 * MIB) is None
    assert cuda_memory.num_failures(where) == 1


def test_a_memory_log_reads_them(device: Device) -> None:
    with CudaMemoryLog(torch.device("cuda", device.number)) as log:
        block = device.allocate(2 * MIB)
        assert block is not None
        log.mark("end")
        device.free(block)
    assert log.segments == [Segment("start", 0, 2 * MIB, 2 * MIB), Segment("end", 2 * MIB, 2 * MIB, 0)]
