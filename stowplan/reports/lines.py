"""Lines of a text report: printable ASCII, a fixed width, one unit for all figures of a kind."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

from stowplan.core.units import GIB, KIB, MIB

__all__ = ["Unit", "bytes_unit", "clean", "cut", "cut_middle", "heading", "seconds_unit", "wrap"]

_UNSHOWN = "n/a"  # what is no finite number


@dataclass(frozen=True, slots=True)
class Unit:
    """How every figure of one kind is written, so that figures can be compared by eye."""

    name: str
    size: float
    digits: int

    def number(self, figure: float) -> str:
        """The figure without its unit: ``"1,234.50"``."""
        return f"{figure / self.size:,.{self.digits}f}" if math.isfinite(figure) else _UNSHOWN

    def text(self, figure: float) -> str:
        """The figure with its unit: ``"1.50 GiB"``."""
        return f"{self.number(figure)} {self.name}"

    def difference(self, figure: float) -> str:
        """A signed difference: ``"+0.25"``, or ``"same"`` where it rounds to nothing."""
        if not math.isfinite(figure):
            return _UNSHOWN
        scaled = round(figure / self.size, self.digits)
        return "same" if scaled == 0 else f"{scaled:+,.{self.digits}f}"


def bytes_unit(largest_bytes: int) -> Unit:
    """The unit in which figures up to ``largest_bytes`` read well."""
    for name, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if largest_bytes >= size:
            return Unit(name, size, 2)
    return Unit("B", 1, 0)


def seconds_unit(largest_seconds: float) -> Unit:
    """The unit in which durations up to ``largest_seconds`` read well."""
    if largest_seconds >= 1:
        return Unit("s", 1, 2)
    if largest_seconds >= 1e-3:
        return Unit("ms", 1e-3, 1)
    return Unit("us", 1e-6, 1)


def clean(text: str) -> str:
    """Printable ASCII only: anything else (line ends, escape sequences, …) becomes ``?``."""
    return "".join(character if " " <= character <= "~" else "?" for character in text)


def cut(text: str, width: int) -> str:
    """``text``, cleaned, in at most ``width`` characters; what is missing shows as ``...``."""
    text = clean(text)
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."[:width]


def cut_middle(text: str, width: int) -> str:
    """Like ``cut``, but both ends stay: names often differ only in the last characters."""
    text = clean(text)
    if len(text) <= width:
        return text
    num_last = max(0, (width - 3) // 2)
    return text[: max(0, width - 3 - num_last)] + "..."[:width] + text[len(text) - num_last :]


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """A sentence over as many lines as it takes, never cut; later lines begin with ``indent``."""
    return textwrap.wrap(clean(text), width, subsequent_indent=indent, break_on_hyphens=False) or [""]


def heading(title: str, origin: str, width: int) -> list[str]:
    """The head of a section; ``origin`` says where its figures are from."""
    return ["", f"{title}  [{origin}]" if origin else title, "-" * width]
