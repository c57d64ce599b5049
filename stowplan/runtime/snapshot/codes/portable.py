"""The kernels in NumPy, for machines without a compiler: blocks that stay in the cache, tables of products."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stowplan.runtime.snapshot.codes.field import product

__all__ = ["NumpyKernels"]

_BLOCK_BYTES = 256 * 1024
_CRC_BLOCK_BYTES = 4 * 1024 * 1024
_CASTAGNOLI = 0x82F63B78  # bits reflected
_WORDS = 64  # of 4 bytes, in the piece that one lane takes

_Bytes = npt.NDArray[np.uint8]
_Registers = npt.NDArray[np.uint32]


class NumpyKernels:
    """``Kernels`` in NumPy."""

    name = "numpy"

    def combine(
        self, coefficients: Sequence[Sequence[int]], sources: Sequence[_Bytes], outs: Sequence[_Bytes], *, add: bool
    ) -> None:
        """As ``Kernels`` says."""
        scratch = np.empty(_BLOCK_BYTES, np.uint8)
        for begin in range(0, len(outs[0]), _BLOCK_BYTES):
            for row, out in zip(coefficients, outs, strict=True):
                total = out[begin : begin + _BLOCK_BYTES]
                if not add:
                    total.fill(0)
                for coefficient, source in zip(row, sources, strict=True):
                    block = source[begin : begin + _BLOCK_BYTES]
                    if coefficient > 1:
                        block = np.take(_products(coefficient), block, out=scratch[: len(block)], mode="clip")
                    if coefficient:
                        np.bitwise_xor(total, block, out=total)

    def crc32c(self, data: _Bytes, crc: int) -> int:
        """As ``Kernels`` says; pieces are taken side by side, and their CRCs added up two by two."""
        register = crc ^ 0xFFFFFFFF
        for begin in range(0, len(data), _CRC_BLOCK_BYTES):
            register = _after(data[begin : begin + _CRC_BLOCK_BYTES], register)
        return register ^ 0xFFFFFFFF


@functools.lru_cache(maxsize=256)
def _products(coefficient: int) -> _Bytes:
    return np.array([product(coefficient, byte) for byte in range(256)], np.uint8)


def _after(data: _Bytes, register: int) -> int:
    """The register after ``data``: the largest power of two of pieces at once, then of the rest, then byte by byte."""
    while num_pieces := len(data) // (4 * _WORDS):
        lanes = 1 << (num_pieces.bit_length() - 1)
        whole = lanes * 4 * _WORDS
        register = _after_lanes(data[:whole].view("<u4").reshape(lanes, _WORDS), register)
        data = data[whole:]
    table = _table()
    for byte in data.tolist():
        register = register >> 8 ^ table[(register ^ byte) & 255]
    return register


def _after_lanes(words: npt.NDArray[np.uint32], register: int) -> int:
    """The same for ``words[lane, place]``, two to some power of lanes that follow each other."""
    registers = np.zeros(len(words), np.uint32)
    registers[0] = register
    step, piece = _after_zeros(4), 4 * _WORDS
    for place in range(_WORDS):
        registers = _moved(registers ^ words[:, place], step)
    while len(registers) > 1:
        registers = _moved(registers[::2], _after_zeros(piece)) ^ registers[1::2]
        piece *= 2
    return int(registers[0])


@functools.cache
def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        register = byte
        for _ in range(8):
            register = register >> 1 ^ (_CASTAGNOLI if register & 1 else 0)
        table.append(register)
    return tuple(table)


@functools.lru_cache(maxsize=64)
def _after_zeros(num_bytes: int) -> tuple[_Registers, _Registers]:
    """What either half of a register becomes after so many zero bytes: two tables of 65536."""
    if num_bytes == 1:
        table = np.array(_table(), np.uint32)
        halves: _Registers = np.arange(1 << 16, dtype=np.uint32)
        return np.bitwise_xor(halves >> np.uint32(8), table[halves & 255]), halves << np.uint32(8)
    assert num_bytes % 2 == 0, "pieces are two to some power long"
    first = _after_zeros(num_bytes // 2)
    return _moved(first[0], first), _moved(first[1], first)


def _moved(registers: _Registers, tables: tuple[_Registers, _Registers]) -> _Registers:
    moved: _Registers = np.bitwise_xor(tables[0][registers & 0xFFFF], tables[1][registers >> 16])
    return moved
