"""The compiled packer: what its C interface takes and gives. The sources beside this file tell the algorithms."""

from __future__ import annotations

import ctypes
import functools
import math
import time
from collections.abc import Callable, Generator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from stowplan.core.errors import InvalidArgument
from stowplan.core.native import compiled, loaded
from stowplan.planner.packing.problem import FREE, Integers, Problem, Solution

__all__ = ["ALL_RULES", "Method", "OnProgress", "library", "prepare", "run", "scale"]

OnProgress = Callable[[int, int, float], object]
"""Called with the best height and the proved bound, in bytes, and the seconds so far; a true answer ends it."""

_HERE = Path(__file__).parent
_HEADERS = ("instance.hpp", "placing.hpp", "greedy.hpp", "improve.hpp", "rules.hpp", "search.hpp", "portfolio.hpp")
ALL_RULES = 127  # every rule of rules.hpp


class Method(IntEnum):
    """Who packs: numbers of the C interface."""

    GREEDY = 0
    EXACT = 1
    AUTO = 2


class _Outcome(IntEnum):
    PACKED = 0
    TOO_LARGE = 1  # for the exact search
    INVALID = 2
    NO_MEMORY = 3


class _Report(ctypes.Structure):
    _fields_ = (("height", ctypes.c_int64), ("bound", ctypes.c_int64), ("seconds", ctypes.c_double))


_Progress = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Report))
_Int64 = np.ctypeslib.ndpointer(np.int64, ndim=1, flags="C_CONTIGUOUS")


def prepare(on_progress: Callable[[str], None] = lambda message: None) -> Path:
    """Compile the packer now, if that is to be done, so that no packing has to wait for it; ``on_progress`` is told.

    Raises CompilationFailed: there is neither a prebuilt one nor a compiler.
    """
    headers = [_HERE / name for name in _HEADERS]
    return compiled("stowplan_pack", [_HERE / "pack.cpp"], headers=headers, on_progress=on_progress)


@functools.cache
def library() -> Any:
    """The compiled packer. Raises CompilationFailed, also where it does not load."""
    function = loaded(prepare()).stowplan_pack
    number = ctypes.POINTER(ctypes.c_int64)
    function.argtypes = [
        ctypes.c_int, _Int64, _Int64, _Int64, _Int64, ctypes.c_int64, ctypes.c_double, ctypes.c_int, ctypes.c_uint,
        _Progress, _Int64, number, number,
    ]  # fmt: skip
    function.restype = ctypes.c_int
    return function


def scale(problem: Problem) -> int:
    """The bytes that all aligned sizes and fixed offsets are multiples of: heights need no others between."""
    fixed: Sequence[Integers] = () if problem.fixed is None else (problem.fixed[problem.fixed != FREE],)
    return math.gcd(*(int(np.gcd.reduce(numbers)) for numbers in (problem.aligned_size, *fixed) if len(numbers))) or 1


def run(
    problem: Problem,
    method: Method,
    capacity_bytes: int | None,
    time_limit_seconds: float,
    on_progress: OnProgress | None = None,
    rules: int = ALL_RULES,
) -> Solution:
    """The best packing of ``problem`` that is found; a bound above ``capacity_bytes`` says that none is within it.

    Ends are padded to the alignment, also when they are compared with the capacity. ``rules``: bits of rules.hpp's
    rules for the exact search. An exception of ``on_progress``, or an interrupt, ends the packing and is raised here.
    Raises InvalidArgument for what the exact search is too large for.
    """
    pack, began, unit = library(), time.perf_counter(), scale(problem)
    raised: list[BaseException] = []

    def answers() -> Generator[int, Any, None]:
        # A function would have interrupts raised before its first line, where nobody can catch them; a generator has
        # them where it goes on, which is inside the try.
        stop = False
        try:
            while True:
                report = (yield stop).contents
                stop = bool(on_progress and on_progress(report.height * unit, report.bound * unit, report.seconds))
        except GeneratorExit:
            return
        except BaseException as error:  # noqa: BLE001 - raised below, outside the C code
            raised.append(error)
            yield True

    told = answers()
    next(told)
    fixed = np.full(len(problem), FREE) if problem.fixed is None else problem.fixed
    offsets, height, bound = np.zeros(len(problem), np.int64), ctypes.c_int64(), ctypes.c_int64()
    arrays = (problem.lower, problem.upper, problem.aligned_size // unit, np.where(fixed == FREE, FREE, fixed // unit))
    capacity = FREE if capacity_bytes is None else capacity_bytes // unit
    asked = (capacity, time_limit_seconds, method, rules, _Progress(told.send))
    outcome = _Outcome(pack(len(problem), *arrays, *asked, offsets, height, bound))
    if raised:
        raise raised[0]
    if outcome is _Outcome.NO_MEMORY:
        raise MemoryError(f"no memory for packing {len(problem)} buffers")
    if outcome is _Outcome.TOO_LARGE:
        raise InvalidArgument(
            f"{len(problem)} buffers are too many for the exact search, which takes up to 4000, and 2 million pairs "
            f'that are alive together: use solver="auto".'
        )
    assert outcome is not _Outcome.INVALID, "Problem has checked all that the packer checks"
    seconds = time.perf_counter() - began
    name = method.name.lower()
    return Solution(offsets * unit, height.value * unit, bound.value * unit, name, seconds)
