"""The slab never gives the same byte to two holders, and has every byte back in the end."""

from __future__ import annotations

import ctypes
import gc
import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stowplan.offload import host_slab
from stowplan.offload.host_slab import HostSlab, Layout, Span

ALIGNMENT = 64


def aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


# Each step takes so many bytes, or gives back the span of that number (modulo those held).
steps = st.lists(st.tuples(st.sampled_from(["take", "give back"]), st.integers(0, 700)), max_size=60)


@pytest.mark.filterwarnings("ignore:the host slab:RuntimeWarning")
@given(size_bytes=st.integers(1, 4000), steps=steps)
def test_spans_are_apart_and_all_come_back(size_bytes: int, steps: list[tuple[str, int]]) -> None:
    slab = HostSlab(size_bytes)
    assert slab.size_bytes == aligned(size_bytes)
    held: list[Span] = []
    for verb, number in steps:
        if verb == "take":
            span = slab.take(number)
            assert span.size_bytes == number
            assert slab.view(span).numel() == number
            held.append(span)
        elif held:
            slab.give_back(held.pop(number % len(held)))
        inside = sorted((s.start, s.start + aligned(s.size_bytes)) for s in held if s.overflow is None)
        assert all(end <= start for (_, end), (start, _) in pairwise(inside))
        assert all(start >= 0 and start % ALIGNMENT == 0 and end <= slab.size_bytes for start, end in inside)
        assert slab.used_bytes == sum(end - start for start, end in inside)
    for span in held:
        slab.give_back(span)
    assert slab.used_bytes == 0
    assert slab.take(slab.size_bytes).start == 0  # one hole again, not many


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=12), order=st.randoms(use_true_random=False))
def test_bytes_stay_as_they_were_written(sizes: list[int], order: object) -> None:
    slab = HostSlab(sum(map(aligned, sizes)))
    spans = [slab.take(size) for size in sizes]
    numbered = list(enumerate(spans))
    order.shuffle(numbered)  # type: ignore[attr-defined]
    for number, span in numbered:
        slab.view(span).fill_(number + 1)
    for number, span in enumerate(spans):
        assert slab.view(span).tolist() == [number + 1] * span.size_bytes


def test_first_fit_takes_the_first_hole_that_is_large_enough() -> None:
    slab = HostSlab(10 * ALIGNMENT)
    a, b, c, d = (slab.take(n * ALIGNMENT) for n in (2, 1, 3, 1))
    slab.give_back(a)
    slab.give_back(c)
    assert slab.take(3 * ALIGNMENT).start == c.start
    assert slab.take(ALIGNMENT).start == a.start
    slab.give_back(b)
    assert slab.take(2 * ALIGNMENT).start == ALIGNMENT  # the rest of a's hole and b's, joined
    assert d.start == 6 * ALIGNMENT


def test_what_does_not_fit_has_a_buffer_of_its_own_with_one_warning() -> None:
    slab = HostSlab(2 * ALIGNMENT)
    inside = slab.take(2 * ALIGNMENT)
    with pytest.warns(RuntimeWarning, match=r"the host slab of 128 B is full: .* beyond the plan") as found:
        beside = [slab.take(100), slab.take(100)]
    assert len(found) == 1
    assert slab.overflow_bytes == 2 * aligned(100)
    for number, span in enumerate(beside):
        slab.view(span).fill_(number)
    assert [slab.view(span).tolist() for span in beside] == [[0] * 100, [1] * 100]
    for span in (*beside, inside):
        slab.give_back(span)
    assert slab.used_bytes == 0
    assert slab.take(ALIGNMENT).overflow is None


def test_a_value_without_bytes_fits_a_full_slab() -> None:
    slab = HostSlab(ALIGNMENT)
    full = slab.take(ALIGNMENT)
    empty = slab.take(0)
    assert slab.view(empty).numel() == 0
    slab.give_back(empty)
    slab.give_back(full)
    assert (slab.used_bytes, slab.overflow_bytes) == (0, 0)


def test_the_slab_is_no_memory_of_the_cpu_allocator() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        slab = HostSlab(2**20)
    assert sum(abs(event.cpu_memory_usage) for event in profile.events()) < 2**10
    assert slab.view(slab.take(2**20)).sum() == 0


class Holder:
    """Gives its span back when the garbage collector finds it: it is part of a circle."""

    def __init__(self, slab: HostSlab, span: Span) -> None:
        self.slab, self.span, self.itself = slab, span, self

    def __del__(self) -> None:
        self.slab.give_back(self.span)


def test_a_forked_child_writes_into_its_own() -> None:
    slab = HostSlab(ALIGNMENT)
    span = slab.take(ALIGNMENT)
    slab.view(span).zero_()
    child = os.fork()
    if not child:
        ctypes.memset(span.address, 1, ALIGNMENT)
        os._exit(0)
    os.waitpid(child, 0)
    assert not slab.view(span).any()


def test_spans_taken_together_lie_side_by_side_where_there_is_room() -> None:
    slab = HostSlab(6 * ALIGNMENT)
    spans, held = slab.take_all(Layout([ALIGNMENT, 0, 2 * ALIGNMENT]))
    assert [span.start for span in spans] == [0, ALIGNMENT, ALIGNMENT]
    assert [(span.start, span.size_bytes) for span in held] == [(0, 3 * ALIGNMENT)]
    hole = slab.take(ALIGNMENT)
    slab.take(2 * ALIGNMENT)
    slab.give_back(hole)
    with pytest.warns(RuntimeWarning, match="is full"):
        spans, held = slab.take_all(Layout([ALIGNMENT, ALIGNMENT]))
    assert [span.start for span in spans] == [hole.start, -1]
    assert spans[1].overflow is not None
    assert held == spans


def test_what_the_collector_gives_back_in_the_middle_of_a_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector may run wherever an object is made, so also between two steps of joining holes."""
    slab = HostSlab(8 * ALIGNMENT)
    spans = [slab.take(ALIGNMENT) for _ in range(8)]
    for span in spans[::2]:
        slab.give_back(span)
    late = [Holder(slab, span) for span in spans[1::2]]

    def align_and_collect(size_bytes: int) -> int:
        if late:
            late.pop()
            gc.collect()
        return aligned(size_bytes)

    aligned = host_slab._aligned
    monkeypatch.setattr(host_slab, "_aligned", align_and_collect)
    assert slab.take(8 * ALIGNMENT)[:2] == (0, 8 * ALIGNMENT)
    assert not late
    assert slab.used_bytes == slab.size_bytes


@pytest.mark.filterwarnings("ignore:the host slab:RuntimeWarning")
def test_where_the_host_is_full_too_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    slab = HostSlab(1024)
    real = host_slab._host_bytes

    def fail(size_bytes: int, device: torch.device | None) -> torch.Tensor:
        if size_bytes > 512:
            raise OSError("no memory")
        return real(size_bytes, device)

    monkeypatch.setattr(host_slab, "_host_bytes", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="no memory"):
            slab.take_all(Layout([512, 512, 64, 576]))
        assert slab.used_bytes == 0


@pytest.mark.parametrize("told", [True, False], ids=["by the runtime", "by a launch"])
def test_the_error_of_a_failed_page_lock_is_not_raised_by_the_next_kernel(
    monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    class Runtime:
        last_error = 0

        def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
            self.last_error = 712
            return self.last_error

        def take_last_error(self) -> int:
            error, self.last_error = self.last_error, 0
            return error

    def launch(*_: object, **__: object) -> None:
        if error := runtime.take_last_error():
            raise RuntimeError(f"CUDA error {error}")

    runtime = Runtime()
    if told:
        monkeypatch.setattr(Runtime, "cudaGetLastError", Runtime.take_last_error, raising=False)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "ones", launch)
    with pytest.raises(RuntimeError, match="failed with CUDA error 712"):
        host_slab.page_lock(4096, 4096)
    launch()
