"""The address map: which buffer lies where, and when. Time to the right, addresses upwards, holes are what stays empty.

Marks are whole numbers in a stretched picture of 20000 by 10000, one path for each category, so that 100,000 buffers
are a file of a megabyte; text is not in the stretched part. Plain arrays in, markup out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from stowplan.core.units import GIB, KIB, MIB, format_bytes
from stowplan.reports.lines import Unit, bytes_unit
from stowplan.reports.markup import NUM_COLOURS, OTHER_COLOUR

__all__ = ["HEIGHT", "WIDTH", "AddressMap", "Category", "Tick", "categories", "largest_at_peak", "marks", "ticks"]

Integers = npt.NDArray[np.int64]

WIDTH, HEIGHT = 20_000, 10_000  # of the stretched picture
MOST_RECTANGLES = 40_000
_HEADROOM = 1.04
_MOST_EMPTY = 0.5  # of the height: a capacity further above is not drawn
_LEAST_OUTLINED = 40  # median height of rectangles: lower ones would be drawn as nothing but outlines

_OF_KIND = {
    **dict.fromkeys(("parameter", "parameters", "weight", "weights"), 0),
    **dict.fromkeys(("gradient", "gradients", "grad", "grads"), 1),
    **dict.fromkeys(("optimizer", "optimizer state", "optimizer states"), 2),
    **dict.fromkeys(("cuda", "nccl", "slack"), 3),
    **dict.fromkeys(("activation", "activations", "kept", "activations kept"), 4),
    **dict.fromkeys(("swap", "swapped", "swap in flight"), 5),
    **dict.fromkeys(("recompute", "recomputed"), 6),
    **dict.fromkeys(("temporary", "temporaries", "temp", "workspace"), 7),
}
_FREE_COLOURS = (4, 0, 2, 6, 7, 1, 5)  # for kinds of another name, those with most bytes x time first
_SIZE_CLASSES = (4 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB, 4 * GIB)
_SIZE_COLOURS = (7, 2, 6, 1, 4, 5, 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class AddressMap:
    """``lower``, ``upper`` (time), ``size``, ``offsets`` (bytes): int64 [n]; ``names`` and ``kinds``: n texts.

    Without ``kinds`` buffers are told apart by size. ``capacity_bytes``: where the capacity is drawn, if there is one.
    ``verdict`` is the picture's title, ``figures`` are names and values that stand below it.
    """

    lower: Integers
    upper: Integers
    size: Integers
    offsets: Integers
    names: Sequence[str] = field(repr=False)
    kinds: Sequence[str] | None = field(default=None, repr=False)
    capacity_bytes: int | None = None
    verdict: str
    figures: Sequence[tuple[str, str]] = ()

    @property
    def height_bytes(self) -> int:
        """Where the highest buffer ends."""
        return int((self.offsets + self.size).max(initial=0))

    @property
    def top_bytes(self) -> float:
        """The address at the upper edge of the picture."""
        return _HEADROOM * max(self.height_bytes, self.drawn_capacity_bytes or 0, 1)

    @property
    def drawn_capacity_bytes(self) -> int | None:
        """The capacity, if there is one and it is not far above all buffers."""
        capacity, most = self.capacity_bytes, (1 + _MOST_EMPTY) * self.height_bytes
        return None if capacity is None or capacity > most else capacity

    @property
    def times(self) -> tuple[int, int]:
        """The times at the left and the right edge."""
        return (int(self.lower.min()), int(self.upper.max())) if len(self.lower) else (0, 1)

    @property
    def areas(self) -> npt.NDArray[np.float64]:
        """Bytes x time of every buffer, float64 [n]."""
        return self.size.astype(np.float64) * (self.upper.astype(np.float64) - self.lower.astype(np.float64))


@dataclass(frozen=True, eq=False)
class Category:
    """Buffers of one colour: ``members`` are their numbers, int64 [k]."""

    label: str
    colour: int
    members: Integers


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: what it says, and where, from 0 to 1."""

    text: str
    place: float


def categories(chart: AddressMap) -> list[Category]:
    """Buffers by kind, or by size where there are no kinds; categories without buffers are left out."""
    if chart.kinds is None:
        return _by_size(chart.size)
    return _by_kind(chart.kinds, chart.areas)


def _by_size(size: Integers) -> list[Category]:
    classes = np.searchsorted(_SIZE_CLASSES, size, side="right")
    edges = [_round_bytes(edge) for edge in _SIZE_CLASSES]
    labels = [f"below {edges[0]}"]
    labels += [f"{first} to {last}" for first, last in pairwise(edges)]
    labels.append(f"{edges[-1]} and more")
    return [
        Category(labels[number], _SIZE_COLOURS[number], np.flatnonzero(classes == number))
        for number in np.unique(classes).tolist()
    ]


def _by_kind(kinds: Sequence[str], areas: npt.NDArray[np.float64]) -> list[Category]:
    found, kind_of = np.unique(np.array(kinds, dtype=object), return_inverse=True)
    weight = np.bincount(kind_of, weights=areas, minlength=len(found))
    colour_of = {number: _OF_KIND[kind.lower()] for number, kind in enumerate(found) if kind.lower() in _OF_KIND}
    free = [colour for colour in _FREE_COLOURS if colour not in colour_of.values()]
    others = [number for number in np.argsort(-weight, kind="stable").tolist() if number not in colour_of]
    colour_of |= dict(zip(others, free, strict=False))
    rest = others[len(free) :]
    colour_of |= dict.fromkeys(rest, OTHER_COLOUR)
    made = []
    for colour in range(NUM_COLOURS):
        members = [number for number, chosen in colour_of.items() if chosen == colour]
        if members:
            label = ", ".join(found[number] or "no kind" for number in members[:3])
            more = f" and {len(members) - 3} other kinds" if len(members) > 3 else ""
            made.append(Category(label + more, colour, np.flatnonzero(np.isin(kind_of, members))))
    return made


def marks(chart: AddressMap) -> tuple[str, int, float]:
    """(paths, one for each category; how many buffers are left out; their share of all bytes x time).

    Beyond ``MOST_RECTANGLES`` those with the least bytes x time are left out.
    """
    areas = chart.areas
    shown = np.ones(len(areas), dtype=np.bool_)
    num_left_out = max(0, len(areas) - MOST_RECTANGLES)
    if num_left_out:
        shown[np.argpartition(areas, num_left_out)[:num_left_out]] = False
    first, last = chart.times
    left = _scaled(chart.lower, first, last - first, WIDTH)
    right = np.maximum(_scaled(chart.upper, first, last - first, WIDTH), left + 1)
    bottom = _scaled(chart.offsets, 0, chart.top_bytes, HEIGHT)
    top = np.maximum(_scaled(chart.offsets + chart.size, 0, chart.top_bytes, HEIGHT), bottom + 1)
    outlined = " o" if len(areas) and np.median(top - bottom) >= _LEAST_OUTLINED else ""
    paths = []
    for category in categories(chart):
        members = category.members[shown[category.members]]
        corners = (left[members], HEIGHT - top[members], right[members] - left[members], top[members] - bottom[members])
        drawn = "".join(
            f"M{x} {y}h{width}v{height}h-{width}z"
            for x, y, width, height in zip(*(corner.tolist() for corner in corners), strict=True)
        )
        paths.append(f'<path class="c{category.colour}{outlined}" d="{drawn}"/>')
    share = float(areas[~shown].sum() / areas.sum()) if num_left_out else 0.0
    return "".join(paths), num_left_out, share


def _scaled(values: Integers, first: int, span: float, length: int) -> Integers:
    """``values`` as whole numbers from 0 (at ``first``, the least) to ``length`` (at ``first + span``)."""
    distance = (values - first).view(np.uint64)  # up to 2**63: the difference of two times may need the sign's bit
    return np.rint(distance.astype(np.float64) * (length / span)).astype(np.int64)


def ticks(chart: AddressMap) -> tuple[list[Tick], list[Tick]]:
    """(of time, of addresses): about five each, at round numbers."""
    first, last = chart.times
    unit = bytes_unit(chart.height_bytes)
    return (
        [Tick(f"{time:,}", (time - first) / (last - first)) for time in _round_numbers(first, last, whole=True)],
        [
            Tick(_round_text(number, unit), number * unit.size / chart.top_bytes)
            for number in _round_numbers(0, chart.top_bytes / unit.size, whole=unit.size == 1)
        ],
    )


def _round_numbers(first: float, last: float, *, whole: bool) -> list[float]:
    """About five round numbers from ``first`` to ``last``; of whole ones, if these are, without rounding."""
    power = 10.0 ** math.floor(math.log10((last - first) / 5))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= (last - first) / 5)
    if whole:
        step = max(1, math.ceil(step))
    return [number * step for number in range(int(-(-first // step)), int(last // step) + 1)]


def _round_text(number: float, unit: Unit) -> str:
    return f"{number:,.6g} {unit.name}"


def _round_bytes(num_bytes: int) -> str:
    """``"4 KiB"`` where ``format_bytes`` has ``"4.00 KiB"``."""
    return format_bytes(num_bytes).replace(".00", "")


def largest_at_peak(chart: AddressMap, count: int) -> tuple[int, Integers]:
    """(a time when most bytes are alive, the ``count`` largest buffers alive then by number, the largest first)."""
    if not len(chart.lower):
        return 0, chart.lower
    times = np.concatenate([chart.upper, chart.lower])
    changes = np.concatenate([-chart.size, chart.size])
    order = np.lexsort((changes, times))  # what ends at a time goes before what begins
    peak = int(times[order[np.cumsum(changes[order]).argmax()]])
    alive = np.flatnonzero((chart.lower <= peak) & (chart.upper > peak))
    return peak, alive[np.argsort(-chart.size[alive], kind="stable")[:count]]
