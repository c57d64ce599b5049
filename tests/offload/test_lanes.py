"""Threads that copy: in order, with errors told to whoever waits, and gone when nobody needs them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

from stowplan.offload.copies.lanes import Pairs, ThreadLane, ThreadLanes


def pair(value: int, num_bytes: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(num_bytes, dtype=torch.uint8), torch.full((num_bytes,), value, dtype=torch.uint8)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_copies_are_made_in_order() -> None:
    lane = ThreadLane("a lane", lambda pairs: time.sleep(0.002))
    destination, _ = pair(0)
    marks = [lane.copy([(destination, pair(value)[1])], "block", None) for value in range(1, 9)]
    marks[-1].wait()
    assert all(mark.is_done() for mark in marks)
    assert destination.unique().tolist() == [8]


def test_a_lane_waits_for_another_ones_mark() -> None:
    release = threading.Event()
    first, second = ThreadLane("first", lambda pairs: release.wait()), ThreadLane("second")
    into, source = pair(5)
    further, _ = pair(0)
    mark = first.copy([(into, source)], "block", None)
    second.wait(mark)
    last = second.copy([(further, into)], "block", None)
    assert not last.is_done()
    release.set()
    last.wait()
    assert further.unique().tolist() == [5]


def test_an_error_of_the_thread_is_raised_by_whoever_waits_and_the_lane_goes_on() -> None:
    failures = iter([True, False])

    def before(pairs: Pairs) -> None:
        if next(failures):
            raise OSError("no host memory there")

    lane = ThreadLane("fails once", before)
    failed, (destination, source) = lane.copy([pair(1)], "block", None), pair(2)
    with pytest.raises(OSError, match="no host memory there"):
        failed.wait()
    lane.copy([(destination, source)], "block", None).wait()
    assert destination.unique().tolist() == [2]


def test_the_thread_holds_no_memory_once_it_is_done() -> None:
    lane = ThreadLane("holds nothing")
    destination, source = pair(1)
    before = torch._C._storage_Use_Count(source.untyped_storage()._cdata)
    lane.copy([(destination, source)], "block", None).wait()
    assert torch._C._storage_Use_Count(source.untyped_storage()._cdata) == before


def test_threads_start_with_the_first_copy_and_end_with_the_lanes() -> None:
    name = "ends with its lane"
    lane = ThreadLane(name)
    assert threads_named(name) == []
    lane.copy([pair(1)], "block", None)
    assert len(threads_named(name)) == 1
    assert threads_named(name)[0].daemon
    del lane
    gc.collect()
    assert eventually(lambda: not threads_named(name))


def test_a_closed_lane_has_done_what_it_was_given() -> None:
    lane = ThreadLane("closed", lambda pairs: time.sleep(0.01))
    mark = lane.copy([pair(1)], "block", None)
    lane.close()
    lane.close()
    assert mark.is_done()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_copies_what_was_under_way_and_what_comes() -> None:
    release = threading.Event()
    lane = ThreadLane("forks", lambda pairs: release.wait())
    destination, source = pair(3)
    mark = lane.copy([(destination, source)], "block", None)
    child = os.fork()
    if not child:
        release.set()
        mark.wait()
        again, more = pair(4)
        lane.copy([(again, more)], "block", None).wait()
        done = destination.tolist() == source.tolist() and again.tolist() == more.tolist()
        os._exit(0 if done else 1)
    release.set()
    mark.wait()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_ends_with_copies_under_way() -> None:
    program = (
        "import time, torch\n"
        "from stowplan.offload.copies.lanes import ThreadLane\n"
        "lane = ThreadLane('busy', lambda pairs: time.sleep(0.05))\n"
        "for _ in range(4):\n"
        "    byte = torch.ones(1 << 20, dtype=torch.uint8)\n"
        "    lane.copy([(torch.zeros_like(byte), byte)], 'block', None)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)


def test_two_lanes_are_two_threads() -> None:
    lanes = ThreadLanes()
    assert lanes.to_host is not lanes.to_device
    compute = lanes.compute()
    assert compute == lanes.compute()
    lanes.to_host.wait(compute.mark())
    compute.wait(lanes.to_host.copy([pair(1)], "block", None))
