"""Logs that know which buffer a free belongs to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stowplan.offload.allocation_log import CpuAllocationLog, _from_history, allocation_log
from stowplan.offload.allocation_record import AllocationRecord, Happening, Segment, What, segments_of
from stowplan.offload.dry.mode import DryLog, DryMode
from stowplan.offload.memory_log import MemoryLog, memory_log

CPU = torch.device("cpu")
KIB = 2**10


def bytes_(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def use(log: MemoryLog) -> None:
    """Two buffers of one size: the first dies first."""
    first, second = bytes_(4 * KIB), bytes_(4 * KIB)
    log.note("second", second)
    log.mark("frees")
    del first
    third = bytes_(2 * KIB)
    del second, third


EVENTS = [4 * KIB, 4 * KIB, ~0, 2 * KIB, ~1, ~2]


def test_frees_are_told_apart_on_the_cpu() -> None:
    with allocation_log(CPU) as log:
        use(log)
    assert log.record is not None
    assert log.record.events == EVENTS
    assert log.record.notes == {"second": 1}
    assert log.record.between("start", "frees") == (4 * KIB, 4 * KIB)
    assert log.record.alive_at("frees") == {0, 1}


def test_frees_are_told_apart_in_a_dry_log() -> None:
    with FakeTensorMode(), DryMode() as mode, DryLog(mode) as log:
        use(log)
    assert log.record is not None
    assert log.record.events == EVENTS
    assert log.record.notes == {"second": 1}
    bytes_(KIB)
    assert log.record.events == EVENTS


def test_both_logs_of_the_cpu_see_the_same_bytes() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    segments = []
    for make in (memory_log, allocation_log):
        with make(CPU) as log:
            log.mark("forward")
            loss = (weight @ weight).softmax(0).sum()
            log.mark("backward")
            loss.backward()
            weight.grad = None
            del loss
        segments.append(log.segments)
    assert segments[0] == segments[1]


def test_what_was_there_before_is_no_buffer_of_the_log() -> None:
    with allocation_log(CPU):
        before = bytes_(KIB)
    with allocation_log(CPU) as log:
        del before
    assert log.record is not None
    assert log.record.events == []
    assert log.segments == [Segment("start", 0, 0, -KIB)]


def test_a_note_gives_a_gradient_no_other_owner() -> None:
    """Autograd adds in place only to what nobody else has."""
    log = CpuAllocationLog()
    tensor = bytes_(KIB)
    with log:
        log.note("it", tensor[10:])
    assert torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) <= 2
    with log:
        grown = bytes_(KIB)
        log.note("view", grown[100:200])
    assert log.record is not None
    assert log.record.notes == {"view": 0}


def test_another_address_may_come_again() -> None:
    happenings = [
        Happening(What.ALLOCATED, 7, 10),
        Happening(What.NOTE, 7, name="one 0"),
        Happening(What.FREED, 7, 10),
        Happening(What.MARK, name="middle"),
        Happening(What.ALLOCATED, 7, 20),
        Happening(What.NOTE, 7, name="one 1"),
        Happening(What.NOTE, 8, name="one 2"),
        Happening(What.FREED, 9, 5),
        Happening(What.ALLOCATED, 10, 0),
    ]
    record = AllocationRecord(happenings)
    assert record.events == [10, ~0, 20]
    assert record.noted("one") == {0: 0, 1: 1}
    assert record.marks == {"middle": 2}
    assert segments_of(happenings) == [Segment("middle", 0, 20, 15)]


def test_cudas_history_is_read_in_its_order() -> None:
    history = [
        {"action": "segment_alloc", "addr": 0, "size": 2**21},
        {"action": "alloc", "addr": 512, "size": 100},
        {"action": "free_requested", "addr": 512, "size": 100},
        {"action": "free_completed", "addr": 512, "size": 100},
    ]
    assert list(_from_history(history, 512)) == [
        Happening(What.ALLOCATED, 512, 512),
        Happening(What.FREED, 512, 512),
    ]


@pytest.mark.slow
def test_the_profiler_writes_nothing() -> None:
    program = (
        "import torch\n"
        "from stowplan.offload.allocation_log import allocation_log\n"
        "for _ in range(2):\n"
        "    with allocation_log(torch.device('cpu')): torch.ones(9).sum()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == done.stderr == ""
