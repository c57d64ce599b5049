"""What a packing says, on one screen: do the buffers fit, how good is it, who found it. Plain numbers in, text out."""

from __future__ import annotations

from dataclasses import dataclass

from stowplan.core.units import KIB, format_bytes, format_seconds
from stowplan.reports.lines import clean, wrap

__all__ = ["PackingReport"]

_WIDTH = 100
_NAME_WIDTH = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingReport:
    """Addresses found for ``num_buffers`` buffers.

    ``height_bytes``: where the highest buffer ends, padded to the ``alignment``. ``bound_bytes``: it is proved that no
    addresses end below. ``seconds``: how long ``solver`` took.
    """

    source: str
    num_buffers: int
    alignment: int
    height_bytes: int
    bound_bytes: int
    capacity_bytes: int | None
    solver: str
    seconds: float

    @property
    def gap(self) -> float:
        """(height - bound) / bound: at most so much higher than the least."""
        return self.height_bytes / self.bound_bytes - 1 if self.bound_bytes else 0.0

    @property
    def excess_bytes(self) -> int:
        """Bytes above the capacity; 0 if there is none."""
        return 0 if self.capacity_bytes is None else max(0, self.height_bytes - self.capacity_bytes)

    @property
    def proved_impossible(self) -> bool:
        """Is it proved that no addresses are within the capacity?"""
        return self.capacity_bytes is not None and self.bound_bytes > self.capacity_bytes

    @property
    def verdict(self) -> str:
        """One sentence or two."""
        buffers = f"{self.num_buffers:,} buffer{'' if self.num_buffers == 1 else 's'}"
        if self.capacity_bytes is None:
            return f"Packed: {buffers} in {format_bytes(self.height_bytes)}, {self._quality}."
        capacity = format_bytes(self.capacity_bytes)
        if not self.excess_bytes:
            return f"Fits: {buffers} in {format_bytes(self.height_bytes)} of {capacity}, {self._quality}."
        over = f"{buffers} take {format_bytes(self.height_bytes)}, {format_bytes(self.excess_bytes)} over the capacity"
        if self.proved_impossible:
            return f"Does not fit: {over} of {capacity}. It is proved that no addresses fit."
        return f"Does not fit: {over} of {capacity}. Addresses that fit were not found; that none do is not proved."

    @property
    def _quality(self) -> str:
        return (
            "which is the least" if self.height_bytes <= self.bound_bytes else f"at most {self.gap:.2%} above the least"
        )

    @property
    def figures(self) -> tuple[tuple[str, str], ...]:
        """Names and values for a table."""
        capacity = "none given" if self.capacity_bytes is None else _exact(self.capacity_bytes)
        return (
            ("file", self.source),
            ("buffers", f"{self.num_buffers:,}"),
            ("alignment", _exact(self.alignment)),
            ("bound", _exact(self.bound_bytes)),
            ("height", _exact(self.height_bytes)),
            ("gap", f"{self.gap:.2%}"),
            ("capacity", capacity),
            ("solver", self.solver),
            ("time", format_seconds(self.seconds)),
        )

    def as_dict(self) -> dict[str, object]:
        """The same for programs; ``fits`` is None without a capacity."""
        return {
            "file": self.source,
            "buffers": self.num_buffers,
            "alignment": self.alignment,
            "bound_bytes": self.bound_bytes,
            "height_bytes": self.height_bytes,
            "gap": self.gap,
            "capacity_bytes": self.capacity_bytes,
            "fits": None if self.capacity_bytes is None else not self.excess_bytes,
            "excess_bytes": self.excess_bytes,
            "proved_impossible": self.proved_impossible,
            "solver": self.solver,
            "seconds": self.seconds,
        }

    def render(self) -> str:
        """Printable ASCII, at most 100 columns unless a file's name is longer."""
        lines = wrap(self.verdict, _WIDTH)
        lines.append("")
        lines += [f"{name:<{_NAME_WIDTH}}{clean(value)}" for name, value in self.figures]
        return "\n".join(lines) + "\n"


def _exact(num_bytes: int) -> str:
    return f"{num_bytes:,} B" + (f"  ({format_bytes(num_bytes)})" if num_bytes >= KIB else "")
