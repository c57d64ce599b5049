"""Sealed, populated memory between processes."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import tempfile
from pathlib import Path

import pytest

from stowplan.core.errors import SnapshotMemoryUnavailable, SnapshotRefused
from stowplan.core.units import MIB
from stowplan.runtime.snapshot.memory import region as memory
from stowplan.runtime.snapshot.memory.region import RESERVE_BYTES, Region, check_available

SIZE = 3 * MIB


@pytest.fixture
def region():
    made = Region.create("test", SIZE)
    yield made
    made.close()


def test_a_region_is_zeros_that_are_in_memory_already(region):
    assert len(region.view) == SIZE
    assert not any(region.view)
    assert os.fstat(region.descriptor).st_blocks * 512 >= SIZE


def test_nobody_can_change_its_size(region):
    for size in (SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(region.descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(region.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_it_lives_as_long_as_one_descriptor(region):
    region.view[5] = 7
    second = Region.received(os.dup(region.descriptor))
    region.close()
    second.populate()
    assert second.view[5] == 7
    second.close()


def test_views_survive_closing(region):
    region.view[1] = 3
    held = region.view[:2]
    assert not region.close()
    assert held[1] == 3
    held.release()
    assert region.close()


def test_forked_children_do_not_have_the_mapping(region):
    region.view[0] = 1
    mappings = Path("/proc/self/smaps").read_text().split("memfd:test")[1:]
    assert len(mappings) == 1
    flags = next(line for line in mappings[0].splitlines() if line.startswith("VmFlags:"))
    assert "dc" in flags.split(), "the kernel's word for not copied on fork"


def test_what_is_no_sealed_memory_is_refused_and_closed():
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, SIZE)
    empty = os.memfd_create("empty", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(empty, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with tempfile.TemporaryFile() as file:
        for descriptor in (unsealed, empty, os.dup(file.fileno()), os.pipe()[0]):
            with pytest.raises(SnapshotRefused) as raised:
                Region.received(descriptor)
            assert raised.value.reason == "unsafe"
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)


def test_too_much_is_refused_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: RESERVE_BYTES + SIZE)
    check_available(SIZE, "two slots")
    with pytest.raises(SnapshotMemoryUnavailable, match=f"two slots take .*{SIZE + 1} bytes.*{SIZE} bytes") as raised:
        check_available(SIZE + 1, "two slots")
    assert (raised.value.needed_bytes, raised.value.available_bytes) == (SIZE + 1, SIZE)
    assert isinstance(raised.value, MemoryError)


def test_other_systems_are_told_so(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SnapshotMemoryUnavailable, match=r"take Linux .* this is darwin"):
        Region.create("test", SIZE)


def test_kernels_without_the_advice_allocate_instead(monkeypatch):
    monkeypatch.setattr(memory, "_advise", lambda *_: errno.EINVAL)
    region = Region.create("test", SIZE)
    assert os.fstat(region.descriptor).st_blocks * 512 >= SIZE
    region.view[7] = 1
    region.populate()
    assert region.view[7] == 1
    region.close()


def test_a_kernel_that_has_no_more_is_told_with_the_size(monkeypatch):
    monkeypatch.setattr(memory, "_advise", lambda *_: errno.ENOMEM)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(SnapshotMemoryUnavailable, match=f"{SIZE} bytes.*Cannot allocate memory"):
        Region.create("test", SIZE)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
