"""The CUDA binding over a runtime whose streams lag behind: who gets whose bytes, and when.

Each test has a device number of its own, and so an arena of its own.
"""

from __future__ import annotations

import ctypes
import random

import pytest

from stowplan.core.errors import ArenaUnavailable
from stowplan.offload.arena.library import library, on_cuda
from tests.offload.arena.device import MAIN, MIB, OTHER, SIDE, Device


@pytest.fixture
def limit_bytes() -> int:
    return 2**40


@pytest.fixture
def device(limit_bytes: int) -> Device:
    return Device(limit_bytes)


def test_planned_bytes_go_to_another_stream_in_order(device: Device) -> None:
    assert device.arena.reserve(MIB)
    device.plan([MIB, MIB], [0, 0], [MAIN, SIDE])
    first = device.allocate(MIB, MAIN)
    device.fill(MAIN, first, MIB, 1)
    device.check(MAIN, first, MIB, 1)
    device.free(first)
    second = device.allocate(MIB, SIDE)
    assert second == first
    device.fill(SIDE, second, MIB, 2)
    device.run(SIDE)  # it runs ahead, as far as it may
    assert device.errors() == 0
    assert device.arena.stats().stream_waits == 1
    assert device.arena.stats().hits == 2


def test_one_stream_never_waits(device: Device) -> None:
    assert device.arena.reserve(4 * MIB)
    device.plan([MIB] * 4, [0, MIB, 0, 2 * MIB], [SIDE] * 4)
    for _ in range(3):
        for _ in range(2):
            pair = [device.allocate(MIB, SIDE) for _ in range(2)]
            for pointer in pair:
                device.free(pointer)
        device.arena.step()
    assert device.arena.stats().hits == 12
    assert device.arena.stats().stream_waits == 0


def _random_program(device: Device, seed: int) -> None:
    """Blocks of planned and other sizes on three streams, some used by another stream, all lagging at random."""
    chance = random.Random(seed)
    sizes = [chance.choice([3, 5, 20]) * 512 * chance.choice([1, 40]) for _ in range(40)]
    streams = [chance.choice([MAIN, MAIN, SIDE, OTHER]) for _ in sizes]
    offsets = [chance.randrange(200) * 512 for _ in sizes]
    assert device.arena.reserve(MIB)
    device.plan(sizes, offsets, streams, key=seed)
    for _ in range(6):
        alive: list[tuple[int, int, int, int]] = []
        for size, stream in zip(sizes, streams, strict=True):
            pointer, value = device.allocate(size, stream), chance.randrange(256)
            assert pointer is not None
            device.fill(stream, pointer, size, value)
            alive.append((stream, pointer, size, value))
            if chance.random() < 0.3:
                user = chance.choice([MAIN, SIDE, OTHER])
                device.order(user, stream)
                device.check(user, pointer, size, value)
                device.record_stream(pointer, user)
            while alive and chance.random() < 0.6:
                device.check_and_free(*alive.pop(chance.randrange(len(alive))))
            device.run(chance.choice([MAIN, SIDE, OTHER]), chance.randrange(6))
        for block in alive:
            device.check_and_free(*block)
        device.arena.step()


def test_streams_never_meet_in_the_same_bytes(device: Device) -> None:
    for seed in range(60):
        _random_program(device, seed)
    assert device.errors() == 0
    counted = device.arena.stats()
    assert counted.stream_waits > 100
    assert counted.hits > 1000
    assert counted.overlaps > 100
    assert (counted.planned_bytes, counted.fallback_bytes) == (0, 0)


def test_without_waiting_streams_would_meet(device: Device) -> None:
    """The check itself: a runtime whose waits do nothing is noticed."""
    device.runtime.stand_in_count_waits(0)
    for seed in range(60):
        _random_program(device, seed)
    assert device.errors() > 0


def test_a_shared_block_lives_to_the_marker(device: Device) -> None:
    assert device.arena.reserve(MIB)
    device.plan([MIB, MIB], [0, 0], [MAIN, MAIN])
    block = device.allocate(MIB)
    device.record_stream(block, SIDE)
    device.check(SIDE, block, MIB, 7)
    device.fill(MAIN, block, MIB, 7)
    device.run(MAIN)
    device.free(block)
    assert device.functions.arena_free(device.handle, ctypes.c_void_p(block)) == 1
    assert device.allocate(MIB) != block  # the second request is planned at the same place
    ended = device.arena.step()
    assert (ended.hits, ended.overlaps) == (1, 1)
    assert device.arena.stats().double_frees == 1
    again = device.allocate(MIB)
    assert again == block
    device.fill(MAIN, again, MIB, 8)
    device.run(MAIN)  # not before SIDE has read
    assert device.errors() == 0


def test_the_pool_keeps_streams_apart_and_reuses(device: Device) -> None:
    main, side = device.allocate(3 * MIB, MAIN), device.allocate(3 * MIB, SIDE)
    mallocs = device.runtime.stand_in_mallocs()
    device.free(main)
    device.free(side)
    assert device.allocate(3 * MIB, SIDE) == side
    assert device.allocate(2 * MIB, MAIN) == main
    assert device.allocate(MIB + 1, MAIN) == main + 2 * MIB  # the rest of the segment
    assert device.runtime.stand_in_mallocs() == mallocs


def test_neighbours_in_the_pool_are_joined(device: Device) -> None:
    blocks = [device.allocate(4 * MIB) for _ in range(5)]  # one segment of 20 MiB
    for block in (blocks[1], blocks[3], blocks[2]):
        device.free(block)
    assert device.allocate(12 * MIB) == blocks[1]
    assert device.runtime.stand_in_used() == 20 * MIB


@pytest.mark.parametrize("limit_bytes", [100 * MIB])
def test_out_of_memory_gives_cached_memory_back_first(device: Device) -> None:
    cached = device.allocate(60 * MIB)
    device.free(cached)
    kept = device.allocate(80 * MIB)
    assert kept is not None
    assert device.allocate(40 * MIB) is None
    assert device.arena.stats().out_of_memory == 1
    assert device.allocate(12 * MIB) is not None
    assert device.allocate(2**61) is None


@pytest.mark.parametrize("limit_bytes", [100 * MIB])
def test_out_of_memory_gives_an_idle_slab_back(device: Device) -> None:
    assert device.arena.reserve(80 * MIB)
    device.plan([80 * MIB], [0], [MAIN])
    device.free(device.allocate(80 * MIB))
    large = device.allocate(90 * MIB)
    assert large is not None
    assert device.arena.step().slab_bytes == 0
    assert not device.arena.reserve(80 * MIB)
    device.free(large)
    assert device.arena.reserve(80 * MIB)
    assert device.arena.step().slab_bytes == 80 * MIB
    assert device.allocate(80 * MIB) is not None
    assert device.arena.step().hits == 1


@pytest.mark.parametrize("limit_bytes", [100 * MIB])
def test_torch_is_told_of_out_of_memory_by_its_own_error(device: Device) -> None:
    device.runtime.stand_in_raised.restype = ctypes.c_char_p
    allocate = device.functions.arena_cuda_allocate

    def raised(num_bytes: int) -> str:
        return str(device.runtime.stand_in_raised(allocate, ctypes.c_ssize_t(num_bytes), device.number).decode())

    said = raised(200 * MIB)
    assert "c1016OutOfMemoryError" in said
    assert f"Tried to allocate {200 * MIB} bytes on device {device.number}" in said
    assert raised(MIB) == ""
    assert raised(0) == ""


def test_each_device_has_an_arena(device: Device) -> None:
    other = Device(2**40)
    device.functions.arena_cuda_allocate.restype = ctypes.c_void_p
    pointer = device.functions.arena_cuda_allocate(ctypes.c_ssize_t(MIB), other.number, None)
    assert other.arena.stats().fallback_bytes == MIB
    assert device.arena.stats().fallback_bytes == 0
    device.functions.arena_cuda_free(ctypes.c_void_p(pointer), ctypes.c_ssize_t(MIB), other.number, None)
    assert other.arena.stats().fallback_bytes == 0
    assert device.runtime.stand_in_used() > 0
    device.functions.arena_cuda_empty_cache()
    assert device.runtime.stand_in_used() == 0


def test_a_runtime_that_is_not_loaded_is_named() -> None:
    functions = library("torch_cuda", lambda message: None)
    with pytest.raises(ArenaUnavailable, match=r"no complete CUDA runtime is loaded \(looked for libnone\.so\.1\)"):
        on_cuda(functions, ("libnone.so.1",), 512, 512, 0)
