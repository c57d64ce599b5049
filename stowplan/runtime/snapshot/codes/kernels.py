"""What works on bytes: sums of multiples over GF(2^8) and CRC-32C, compiled or in NumPy. Both give the same bytes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from stowplan.core.errors import CompilationFailed, InvalidArgument
from stowplan.runtime.snapshot.codes.native import NativeKernels
from stowplan.runtime.snapshot.codes.portable import NumpyKernels

__all__ = ["Bytes", "Kernels", "as_bytes", "best_kernels", "crc32c"]

Bytes: TypeAlias = npt.NDArray[np.uint8]


class Kernels(Protocol):
    """Buffers are flat, contiguous arrays of uint8 at any alignment; callers have checked them."""

    name: str

    def combine(
        self, coefficients: Sequence[Sequence[int]], sources: Sequence[Bytes], outs: Sequence[Bytes], *, add: bool
    ) -> None:
        """Set ``outs[o]`` to the sum over s of ``coefficients[o][s] · sources[s]``, or with ``add`` add that to it.

        All buffers are equally long, and no output overlaps another buffer.
        """

    def crc32c(self, data: Bytes, crc: int) -> int:
        """The CRC-32C of what ``crc`` belongs to (0: of nothing), followed by ``data``."""


@functools.cache
def best_kernels() -> Kernels:
    """The compiled kernels, or NumPy's, with one warning, where there is neither a prebuilt library nor a compiler."""
    try:
        return NativeKernels()
    except CompilationFailed as error:
        warnings.warn(
            f"snapshots are coded and checked by NumPy, many times slower than by the compiled library: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return NumpyKernels()


def as_bytes(buffer: object, name: str, *, writable: bool = False) -> Bytes:
    """The bytes of any contiguous buffer (bytes, memoryview, mmap, array of any dtype) as uint8, without a copy.

    Raises InvalidArgument: no buffer, not contiguous, or to be written to and read-only.
    """
    try:
        view = memoryview(buffer)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{name} is {type(buffer).__name__}, which gives no buffer: give bytes, a memoryview or a NumPy array."
        ) from error
    if not view.c_contiguous:
        raise InvalidArgument(f"{name} is not contiguous: give a contiguous buffer, as copies are never made here.")
    if writable and view.readonly:
        raise InvalidArgument(f"{name} is read-only and has to be written to: give a bytearray or a writable array.")
    if not view.nbytes:
        return np.empty(0, np.uint8)
    return np.frombuffer(view.cast("B"), np.uint8)


def crc32c(buffer: object, crc: int = 0, *, kernels: Kernels | None = None) -> int:
    """The CRC-32C (Castagnoli; RFC 3720) of a buffer; ``crc`` is that of what came before, to go on from.

    Raises InvalidArgument: ``buffer`` is no contiguous buffer, or ``crc`` not within 32 bits.
    """
    if not 0 <= crc < 1 << 32:
        raise InvalidArgument(f"crc={crc} is no CRC of 32 bits: give 0, or what crc32c gave for the bytes before.")
    return (kernels or best_kernels()).crc32c(as_bytes(buffer, "buffer"), crc)
