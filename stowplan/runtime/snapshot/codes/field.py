"""GF(2^8) modulo x^8 + x^4 + x^3 + x^2 + 1, for the few numbers that a plan has; buffers are for kernels.

The field of RAID-6 (H. P. Anvin, "The mathematics of RAID-6"): 2 generates it, addition is XOR.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ORDER", "inverse", "power", "product", "solve"]

ORDER = 255  # of 2: its powers 0 to 254 are all numbers but 0
_MODULUS = 0x11D


def _powers() -> tuple[int, ...]:
    powers = [1]
    for _ in range(ORDER - 1):
        doubled = powers[-1] << 1
        powers.append(doubled ^ _MODULUS if doubled > ORDER else doubled)
    return tuple(powers)


_POWER = _powers()
_EXPONENT = {number: exponent for exponent, number in enumerate(_POWER)}


def power(exponent: int) -> int:
    """2 to the ``exponent``."""
    return _POWER[exponent % ORDER]


def product(a: int, b: int) -> int:
    """``a`` times ``b``."""
    return _POWER[(_EXPONENT[a] + _EXPONENT[b]) % ORDER] if a and b else 0


def inverse(a: int) -> int:
    """What gives 1 with ``a``, which is not 0."""
    return _POWER[-_EXPONENT[a] % ORDER]


def solve(matrix: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> list[list[int]]:
    """X with ``matrix`` · X = ``right``; ``matrix`` is square and can be inverted (Gauss and Jordan's elimination)."""
    size = len(matrix)
    rows = [[*left, *more] for left, more in zip(matrix, right, strict=True)]
    for column in range(size):
        pivot = next(row for row in range(column, size) if rows[row][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        scale = inverse(rows[column][column])
        rows[column] = [product(scale, number) for number in rows[column]]
        for row in range(size):
            if row != column and (factor := rows[row][column]):
                rows[row] = [a ^ product(factor, b) for a, b in zip(rows[row], rows[column], strict=True)]
    return [row[size:] for row in rows]
