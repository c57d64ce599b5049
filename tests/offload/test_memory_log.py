"""Live bytes between marks, as torch's allocator reports them."""

from __future__ import annotations

import gc

import pytest
import torch

from stowplan.core.errors import InvalidArgument
from stowplan.offload.memory_log import CpuMemoryLog, Segment, memory_log

CPU = torch.device("cpu")
KIB = 2**10


@pytest.fixture(autouse=True)
def _no_garbage() -> None:
    """What other tests left must not be freed while a log is open: it may be known from an earlier one."""
    gc.collect()


def bytes_(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def test_segments_between_marks() -> None:
    with memory_log(CPU) as log:
        first = bytes_(4 * KIB)
        log.mark("peak")
        second = bytes_(8 * KIB)
        del second
        third = bytes_(2 * KIB)
        log.mark("empty")
        log.mark("frees")
        del first
    assert log.segments == [
        Segment("start", 0, 4 * KIB, 4 * KIB),
        Segment("peak", 4 * KIB, (4 + 8) * KIB, (4 + 2) * KIB),
        Segment("empty", (4 + 2) * KIB, (4 + 2) * KIB, (4 + 2) * KIB),
        Segment("frees", (4 + 2) * KIB, (4 + 2) * KIB, 2 * KIB),
    ]
    del third


def test_scratch_inside_a_kernel_counts() -> None:
    size = 4 * KIB
    x = torch.ones(size // 4)
    with memory_log(CPU) as log:
        y = torch.nn.functional.gelu(x + 1)
    assert log.segments == [Segment("start", 0, 2 * size, size)]
    del y


def test_what_goes_that_was_there_before() -> None:
    before = bytes_(16 * KIB)
    with memory_log(CPU) as log:
        log.freed(16 * KIB)
        del before
        log.mark("after")
        after = bytes_(4 * KIB)
    assert log.segments == [
        Segment("start", 0, 0, -16 * KIB),
        Segment("after", -16 * KIB, -12 * KIB, -12 * KIB),
    ]
    del after


def test_what_an_earlier_log_saw_coming_goes_once() -> None:
    """The allocator tells the free by itself then, right after it was announced."""
    with memory_log(CPU):
        before = bytes_(16 * KIB)
    with memory_log(CPU) as log:
        log.freed(16 * KIB)
        del before
    assert log.segments == [Segment("start", 0, 0, -16 * KIB)]


def test_backward_is_seen() -> None:
    weight = torch.ones(KIB, requires_grad=True)
    size = weight.nbytes
    with memory_log(CPU) as log:
        log.mark("forward")
        out = weight.exp()
        loss = out.sum()
        log.mark("backward")
        loss.backward()
        del out
    forward, backward = log.segments[1:]
    assert (forward.start_bytes, forward.end_bytes) == (0, size + loss.nbytes)
    assert backward.peak_bytes >= 2 * size
    del loss


def test_many_events_stay_in_order() -> None:
    with memory_log(CPU) as log:
        kept = [bytes_(KIB) for _ in range(100)]
        log.mark("end")
    assert log.segments[0] == Segment("start", 0, 100 * KIB, 100 * KIB)
    del kept


def test_another_profiler_is_an_error() -> None:
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profiler, pytest.raises(InvalidArgument, match=r"a torch profiler .* is active in this thread.*end it first"):
        CpuMemoryLog().__enter__()
    with memory_log(CPU), pytest.raises(InvalidArgument, match=r"another stowplan\.measure"):
        CpuMemoryLog().__enter__()
    with memory_log(CPU) as log:
        kept = bytes_(KIB)
    assert log.segments == [Segment("start", 0, KIB, KIB)]
    del kept


def test_an_exception_ends_the_log() -> None:
    log, kept = CpuMemoryLog(), []

    def allocate_and_fail() -> None:
        with log:
            kept.append(bytes_(KIB))
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        allocate_and_fail()
    assert log.segments == [Segment("start", 0, KIB, KIB)]
    assert not torch.autograd._profiler_enabled()
