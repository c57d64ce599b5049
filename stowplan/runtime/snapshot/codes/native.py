"""The compiled kernels. ctypes gives the interpreter's lock back during each call, so other threads go on."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stowplan.core.errors import InvalidArgument
from stowplan.core.native import compiled, loaded

__all__ = ["NativeKernels", "Variant", "prepare", "variants"]

_HERE = Path(__file__).parent
_HEADERS = ("field.hpp", "multiply.hpp", "checksum.hpp")


class Variant(IntEnum):
    """Instructions that multiply: numbers of the C interface, from the slowest to the fastest of each processor."""

    PORTABLE = 0
    SSSE3 = 1
    AVX2 = 2
    GFNI = 3
    NEON = 4


def prepare(on_progress: Callable[[str], None] = lambda message: None) -> Path:
    """Compile the kernels now, if that is to be done, so that no snapshot has to wait for it; ``on_progress`` is told.

    Raises CompilationFailed: there is neither a prebuilt library nor a compiler.
    """
    headers = [_HERE / name for name in _HEADERS]
    return compiled("stowplan_codes", [_HERE / "codes.cpp"], headers=headers, flags=["-O3"], on_progress=on_progress)


@functools.cache
def _library() -> Any:
    library = loaded(prepare())
    library.stowplan_variants.argtypes, library.stowplan_variants.restype = [], ctypes.c_int
    library.stowplan_combine.argtypes = [
        ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t,
        ctypes.c_int,
    ]  # fmt: skip
    library.stowplan_combine.restype = None
    library.stowplan_crc32c.argtypes = [ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]
    library.stowplan_crc32c.restype = ctypes.c_uint32
    return library


def variants() -> tuple[Variant, ...]:
    """Those that this processor runs, the fastest last. Raises CompilationFailed."""
    found = _library().stowplan_variants()
    return tuple(variant for variant in Variant if found >> variant & 1)


class NativeKernels:
    """``Kernels`` in C++; ``variant`` is the fastest that there is unless named. PORTABLE takes a CRC by tables, too.

    Raises CompilationFailed, and InvalidArgument for a variant that this processor has not.
    """

    def __init__(self, variant: Variant | None = None) -> None:
        known = variants()
        if variant is not None and variant not in known:
            names = ", ".join(each.name for each in known)
            raise InvalidArgument(f"variant={variant.name} is nothing that this processor runs; it has {names}.")
        self._variant = known[-1] if variant is None else variant
        self.name = f"native {self._variant.name.lower()}"
        self._combine, self._crc32c = _library().stowplan_combine, _library().stowplan_crc32c

    def combine(
        self,
        coefficients: Sequence[Sequence[int]],
        sources: Sequence[npt.NDArray[np.uint8]],
        outs: Sequence[npt.NDArray[np.uint8]],
        *,
        add: bool,
    ) -> None:
        """As ``Kernels`` says."""
        numbers = b"".join(map(bytes, coefficients))
        size = len(outs[0])
        self._combine(self._variant, len(outs), len(sources), numbers, _pointers(sources), _pointers(outs), size, add)

    def crc32c(self, data: npt.NDArray[np.uint8], crc: int) -> int:
        """As ``Kernels`` says."""
        return int(self._crc32c(self._variant is not Variant.PORTABLE, crc, data.ctypes.data, len(data)))


def _pointers(buffers: Sequence[npt.NDArray[np.uint8]]) -> Any:
    return (ctypes.c_void_p * len(buffers))(*(buffer.ctypes.data for buffer in buffers))
