"""A CUDA device that is not there: the arena's CUDA binding over a runtime on host memory, whose streams lag behind.

Each device has a number of its own, and so an arena of its own.
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import numpy as np

from stowplan.core.native import compiled
from stowplan.offload.arena.library import library, on_cuda

__all__ = ["MAIN", "MIB", "OTHER", "SIDE", "Device"]

MIB = 2**20
MAIN, SIDE, OTHER = 0, 64, 128  # streams
_numbers = itertools.count()


class Device:
    """The stand-in runtime, and the arena over it."""

    def __init__(self, limit_bytes: int) -> None:
        stand_in = compiled("stand_in_cudart", [Path(__file__).with_name("stand_in_cudart.cpp")])
        self.runtime = ctypes.CDLL(str(stand_in))
        for name in ("mallocs", "used", "errors"):
            getattr(self.runtime, f"stand_in_{name}").restype = ctypes.c_int64
        self.functions = library("torch_cuda", lambda message: None)
        self.functions.arena_allocate.restype = ctypes.c_void_p
        self.functions.arena_cuda_of.restype = ctypes.c_void_p
        self.number = next(_numbers)
        self.arena = on_cuda(self.functions, (str(stand_in),), 512, 512, self.number)
        self.handle = ctypes.c_void_p(self.functions.arena_cuda_of(self.number))
        self.functions.arena_cuda_empty_cache()
        self.runtime.stand_in_begin(ctypes.c_int64(limit_bytes))
        self.thread = self._this_thread()
        self.arena.serve(True)

    def _this_thread(self) -> int:
        """The number that the arena gives to the thread of the tests."""
        self.arena.record(1)
        self.free(self.allocate(MIB) or 0)
        self.arena.record(0)
        self.functions.arena_cuda_empty_cache()
        self.arena.step()
        return int(self.arena.log(1, 1)[0, 3])

    def plan(self, sizes: list[int], offsets: list[int], streams: list[int], key: int = 1) -> None:
        columns = [np.array(column, np.int64) for column in ([self.thread] * len(sizes), streams, sizes, offsets)]
        self.arena.add_plan(key, *columns)

    def allocate(self, size: int, stream: int = MAIN) -> int | None:
        return self.functions.arena_allocate(self.handle, ctypes.c_size_t(size), ctypes.c_void_p(stream))

    def free(self, pointer: int) -> None:
        assert self.functions.arena_free(self.handle, ctypes.c_void_p(pointer)) == 0

    def record_stream(self, pointer: int, stream: int) -> None:
        self.functions.arena_cuda_record_stream(ctypes.c_void_p(pointer), ctypes.c_void_p(stream))

    def fill(self, stream: int, pointer: int, size: int, value: int) -> None:
        self.runtime.stand_in_fill(*map(ctypes.c_void_p, (stream, pointer, size)), value)

    def check(self, stream: int, pointer: int, size: int, value: int) -> None:
        self.runtime.stand_in_check(*map(ctypes.c_void_p, (stream, pointer, size)), value)

    def check_and_free(self, stream: int, pointer: int, size: int, value: int) -> None:
        self.check(stream, pointer, size, value)
        self.free(pointer)

    def order(self, waiting: int, working: int) -> None:
        self.runtime.stand_in_order(ctypes.c_void_p(waiting), ctypes.c_void_p(working))

    def run(self, stream: int, most: int = 2**30) -> None:
        self.runtime.stand_in_run(ctypes.c_void_p(stream), most)

    def errors(self) -> int:
        self.runtime.stand_in_synchronize()
        return int(self.runtime.stand_in_errors())
