"""The compiled arena: built for the installed torch on first use, loaded with ctypes. ``arena.h`` says what it does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from stowplan.core.errors import ArenaUnavailable
from stowplan.core.native import compiled, loaded

__all__ = ["ALLOCATE", "FREE", "Arena", "ArenaStats", "ArenaStep", "Integers", "library"]

Integers = npt.NDArray[np.int64]

ALLOCATE, FREE = 1, -1  # kinds of events
_EVENT_COLUMNS = 5  # kind, block, size, thread, stream
_NO_MEMORY = -2
_MOST_BYTES = 2**60  # as in arena.cpp
_HERE = Path(__file__).parent
_TORCH = Path(torch.__file__).parent


class ArenaStats(ctypes.Structure):
    """The struct of this name in ``arena.h``."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "steps",
            "requests",
            "small",
            "hits",
            "misses",
            "unplanned",
            "strangers",
            "overlaps",
            "resynchronisations",
            "plan_changes",
            "unknown_frees",
            "double_frees",
            "out_of_memory",
            "stream_waits",
            "reserved_bytes",
            "slab_bytes",
            "planned_bytes",
            "peak_bytes",
            "fallback_bytes",
            "fallback_peak_bytes",
            "live_peak_bytes",
        )
    ]


class ArenaStep(ctypes.Structure):
    """The struct of this name in ``arena.h``."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "plan",
            "thread",
            "requests",
            "hits",
            "misses",
            "unplanned",
            "strangers",
            "overlaps",
            "resynchronisations",
            "peak_bytes",
            "slab_bytes",
            "num_events",
            "dropped_events",
        )
    ]


def library(binding: str, on_progress: Callable[[str], None]) -> ctypes.CDLL:
    """The core with its ``binding``, ``"torch_cpu"`` or ``"torch_cuda"``; ``on_progress`` is told when it compiles.

    Raises CompilationFailed.
    """
    flags = [
        *(
            "-isystem",
            str(_TORCH / "include"),
            f"-L{_TORCH / 'lib'}",
            "-Wl,--no-as-needed",
            "-lc10",
            "-ldl",
            f"-Wl,-rpath,{_TORCH / 'lib'}",
        ),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-DTORCH_VERSION={torch.__version__}",  # headers of another version: another library
    ]
    path = compiled(
        f"arena_{binding}",
        [_HERE / "arena.cpp", _HERE / "interface.cpp", _HERE / f"{binding}.cpp"],
        headers=sorted(_HERE.glob("*.h")),
        flags=flags,
        on_progress=on_progress,
    )
    return loaded(path)


class Arena:
    """An arena of the library, by its handle."""

    def __init__(self, functions: ctypes.CDLL, handle: int) -> None:
        self._functions = functions
        self._handle = ctypes.c_void_p(handle)
        functions.arena_read_log.restype = ctypes.c_int64

    def beside(self, device: int) -> Arena:
        """That of another CUDA device: each has its own, one of them has plans."""
        return Arena(self._functions, self._functions.arena_cuda_of(ctypes.c_int(device)))

    def step(self) -> ArenaStep:
        """End a step and begin the next; what happened in the one that ended."""
        ended = ArenaStep()
        self._functions.arena_step(self._handle, ctypes.byref(ended))
        return ended

    def record(self, most_events: int) -> None:
        """Keep a log of at most so many events of each step; 0: none."""
        self._functions.arena_record(self._handle, ctypes.c_int64(most_events))

    def log(self, steps_ago: int, most_events: int) -> Integers:
        """Events [n, 5]: kind, block, size, thread, stream; of this step (0), of the last (1), or before (2)."""
        events = np.empty((most_events, _EVENT_COLUMNS), np.int64)
        count = self._functions.arena_read_log(
            self._handle, ctypes.c_int(steps_ago), _pointer(events), ctypes.c_int64(most_events)
        )
        return events[:count]

    def reserve(self, num_bytes: int) -> bool:
        """Memory for plans, at least so much; False: there is not enough."""
        return num_bytes < _MOST_BYTES and not self._functions.arena_reserve(self._handle, ctypes.c_int64(num_bytes))

    def add_plan(self, key: int, threads: Integers, streams: Integers, sizes: Integers, offsets: Integers) -> None:
        """Requests in order, int64 [n] each; offset -1: not planned. They must fit into what is reserved.

        Raises MemoryError.
        """
        columns = [np.ascontiguousarray(column, np.int64) for column in (threads, streams, sizes, offsets)]
        refused = self._functions.arena_add_plan(
            self._handle, ctypes.c_int64(key), ctypes.c_int64(len(sizes)), *map(_pointer, columns)
        )
        if refused == _NO_MEMORY:
            raise MemoryError(f"no memory for a plan of {len(sizes)} requests")
        assert not refused, "a planned address is outside of the slab, or misaligned"

    def drop_plan(self, key: int) -> None:
        self._functions.arena_drop_plan(self._handle, ctypes.c_int64(key))

    def serve(self, on: bool) -> None:
        self._functions.arena_serve(self._handle, ctypes.c_int(on))

    def stats(self) -> ArenaStats:
        counted = ArenaStats()
        self._functions.arena_stats(self._handle, ctypes.byref(counted))
        return counted

    def forget(self) -> None:
        """Every plan, log and counter goes, and the slab as soon as no block is in it; blocks that are alive stay."""
        self._functions.arena_forget(self._handle)

    def reset_peak(self) -> None:
        """``live_peak_bytes`` begins anew."""
        self._functions.arena_reset_peak(self._handle)


def _pointer(array: Integers) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def on_cpu(functions: ctypes.CDLL, alignment: int, least_bytes: int) -> Arena:
    """Make the arena torch's CPU allocator. Raises ArenaUnavailable where another one cannot be put back."""
    functions.arena_cpu_install.restype = ctypes.c_void_p
    handle = functions.arena_cpu_install(ctypes.c_int64(alignment), ctypes.c_int64(least_bytes))
    if handle is None:
        raise ArenaUnavailable(
            "torch's CPU allocator has been replaced by one that the arena cannot stand before (it has no raw deleter, "
            "or came after the arena was first installed): install the arena first, or leave one of them out."
        )
    return Arena(functions, handle)


def on_cuda(
    functions: ctypes.CDLL, cudart_names: Sequence[str], alignment: int, least_bytes: int, device: int
) -> Arena:
    """The arena of CUDA device number ``device``, over the CUDA runtime that is loaded under one of the names.

    Raises ArenaUnavailable: none is loaded, or it is not complete.
    """
    for name in cudart_names:
        status = functions.arena_cuda_load(name.encode(), ctypes.c_int64(alignment), ctypes.c_int64(least_bytes))
        if status == 0:
            functions.arena_cuda_of.restype = ctypes.c_void_p
            return Arena(functions, functions.arena_cuda_of(ctypes.c_int(device)))
    raise ArenaUnavailable(
        f"no complete CUDA runtime is loaded (looked for {', '.join(cudart_names)}): install a torch with CUDA."
    )
