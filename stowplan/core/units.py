"""Sizes: numbers of bytes, as integers or as text such as ``"60GiB"``."""

from __future__ import annotations

import re

from stowplan.core.errors import InvalidSize

__all__ = ["format_bytes", "format_seconds", "parse_bytes"]

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_UNITS = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-zA-Z]*)\s*")


def parse_bytes(size: int | str, name: str = "size") -> int:
    """Read a size: an int is bytes, text is a number with a unit (``"60GiB"``, ``"512 MiB"``, ``"80GB"``).

    Binary units (KiB, MiB, GiB, TiB) are powers of 1024, decimal ones (KB, MB, GB, TB) of 1000. ``name`` is the
    argument's name in the error. Raises InvalidSize for ratios, negative sizes, unknown units and other types.
    """
    allowed = f'{name} takes a number of bytes: an int, or text with a unit such as "60GiB" or "512MiB"'
    if isinstance(size, bool) or not isinstance(size, int | str):
        if isinstance(size, float):
            raise InvalidSize(
                f"{name}={size!r} is a fraction or a float; {allowed}. Ratios are refused because their meaning "
                f"changes with the device, its other processes and the batch: say how many bytes this process may use."
            )
        raise InvalidSize(f"{name}={size!r} is a {type(size).__name__}; {allowed}.")
    if isinstance(size, int):
        if size <= 0:
            raise InvalidSize(f"{name}={size} is not positive; {allowed}.")
        return size
    match = _SIZE.fullmatch(size)
    if match is None or match["unit"].lower() not in _UNITS:
        raise InvalidSize(f"{name}={size!r} is not a size; {allowed}. Units: B, KiB, MiB, GiB, TiB, KB, MB, GB, TB.")
    if "." in match["number"] and not match["unit"]:
        raise InvalidSize(f"{name}={size!r} has a fraction but no unit; {allowed}.")
    num_bytes = round(float(match["number"]) * _UNITS[match["unit"].lower()])
    if num_bytes <= 0:
        raise InvalidSize(f"{name}={size!r} is not positive; {allowed}.")
    return num_bytes


def format_bytes(num_bytes: int | float) -> str:
    """Bytes for people: ``"1.50 GiB"``; exact below 1 KiB. Negative sizes keep their sign."""
    sign, size = ("-", -num_bytes) if num_bytes < 0 else ("", num_bytes)
    for unit, scale in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= scale:
            return f"{sign}{size / scale:.2f} {unit}"
    return f"{sign}{size:.0f} B"


def format_seconds(seconds: float) -> str:
    """Seconds for people: ``"1.25 s"``, ``"12.5 ms"``, ``"80 us"``."""
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    if abs(seconds) >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.0f} us"
