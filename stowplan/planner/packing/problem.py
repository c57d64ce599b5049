"""Buffers with known lifetimes, and the addresses they are given.

Times are any integers; a buffer lives from ``lower`` up to, not including, ``upper``. Sizes and offsets are bytes. The
problem is dynamic storage allocation (NP-hard): buffers alive together must not share bytes, the highest address is to
be least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stowplan.core.errors import InvalidArgument

__all__ = ["FREE", "Integers", "Problem", "Solution"]

Integers = npt.NDArray[np.int64]

FREE = -1  # instead of a fixed offset: the packer decides
_MOST_BYTES = 2**60  # in all: sums of sizes stay far from overflow


@dataclass(frozen=True, eq=False)
class Problem:
    """``lower``, ``upper``, ``size``: one number for each of n buffers, int64 [n]; n may be 0.

    ``alignment``: offsets are multiples of it. ``fixed``: offsets that are given, int64 [n], ``FREE`` where they are
    not. ``names``: what messages call the buffers; by default their numbers.

    Raises InvalidArgument for lifetimes that end before they have begun, sizes that are not positive, unequal lengths,
    what is no whole number of 64 bits.
    """

    lower: Integers
    upper: Integers
    size: Integers
    alignment: int = 1
    fixed: Integers | None = None
    names: Sequence[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        count = len(self.lower)
        for name in ("upper", "size", "fixed", "names"):
            given = getattr(self, name)
            if given is not None and len(given) != count and (name != "names" or given):
                raise InvalidArgument(f"{name} has {len(given)} entries for {count} buffers: give one for each.")
        for name in ("lower", "upper", "size", "fixed"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, _whole(name, given))
        if not 1 <= self.alignment <= _MOST_BYTES:
            raise InvalidArgument(f"alignment={self.alignment}: give a positive number of bytes, up to 2**60.")
        self._refuse(self.upper <= self.lower, "its lifetime [lower, upper) is empty: upper must be above lower")
        self._refuse(self.size <= 0, "its size is not positive: leave such buffers out")
        padded = float(np.ceil(self.size / self.alignment).sum()) * self.alignment
        if padded > _MOST_BYTES:
            raise InvalidArgument(
                f"the sizes, padded to the alignment ({self.alignment}), add up to more than 2**60 bytes: {padded:g}."
            )
        if self.fixed is not None:
            placed = self.fixed != FREE
            self._refuse(placed & (self.fixed < 0), f"its fixed offset is negative; {FREE} says that there is none")
            self._refuse(placed & (self.fixed > _MOST_BYTES), "its fixed offset is above 2**60 bytes")
            self._refuse(
                placed & (self.fixed % self.alignment != 0), f"its fixed offset is no multiple of {self.alignment}"
            )

    def _refuse(self, wrong: npt.NDArray[np.bool_], why: str) -> None:
        if wrong.any():
            buffer = int(np.argmax(wrong))
            raise InvalidArgument(
                f"buffer {self.name_of(buffer)} (lower {self.lower[buffer]}, upper {self.upper[buffer]}, "
                f"size {self.size[buffer]}): {why}."
            )

    def __len__(self) -> int:
        return len(self.lower)

    def name_of(self, buffer: int) -> str:
        """What messages call buffer number ``buffer``."""
        return self.names[buffer] if self.names else str(buffer)

    @cached_property
    def aligned_size(self) -> Integers:
        """Sizes rounded up to the alignment: no other buffer can begin before, int64 [n]."""
        return -(-self.size // self.alignment) * self.alignment

    @cached_property
    def bound_bytes(self) -> int:
        """The most bytes that are alive together, or where the highest fixed buffer ends, padded to the alignment.

        No addresses can do with less.
        """
        if not len(self):
            return 0
        highest = (
            0 if self.fixed is None else int(np.where(self.fixed == FREE, 0, self.fixed + self.aligned_size).max())
        )
        times = np.concatenate([self.upper, self.lower])
        changes = np.concatenate([-self.aligned_size, self.aligned_size])
        order = np.lexsort((changes, times))  # what ends at a time goes before what begins
        return max(highest, int(np.cumsum(changes[order]).max()))


def _whole(name: str, given: object) -> Integers:
    numbers = np.asarray(given)
    whole = numbers.dtype.kind in "biu" and int(numbers.max(initial=0)) < 2**63
    if numbers.ndim != 1 or not (whole or not numbers.size):
        raise InvalidArgument(
            f"{name} has {numbers.dtype} numbers in {numbers.ndim} dimensions: give a list of whole numbers from "
            f"-2**63 to 2**63 - 1."
        )
    return np.ascontiguousarray(numbers, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Solution:
    """Where every buffer goes.

    ``offsets`` int64 [n]; ``height_bytes`` is where the highest ends, padded to the alignment; ``bound_bytes``
    is proved: none can end lower. ``solver`` says who found them, in ``seconds``.
    """

    offsets: Integers
    height_bytes: int
    bound_bytes: int
    solver: str
    seconds: float = 0.0

    @property
    def gap(self) -> float:
        """How far the height may be above the least: (height - bound) / bound; 0.0 proves that it is the least."""
        return self.height_bytes / self.bound_bytes - 1 if self.bound_bytes else 0.0
