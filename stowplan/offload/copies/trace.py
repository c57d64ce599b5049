"""What ran when: for drawing one real step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Trace", "TraceSpan"]


class TraceSpan(NamedTuple):
    """``what`` was done for ``block`` by ``queue`` ("compute", "to host", "to device"), in seconds from the first
    thing recorded.
    """

    queue: str
    block: str
    what: str
    start_seconds: float
    end_seconds: float


class Trace:
    """A list of what ran; ``seconds_between`` reads two of the device's time stamps."""

    def __init__(self, seconds_between: Callable[[Any, Any], float]) -> None:
        self._seconds_between = seconds_between
        self._recorded: list[tuple[str, str, str, Any, Any]] = []

    def add(self, queue: str, block: str, what: str, start: Any, end: Any) -> None:
        self._recorded.append((queue, block, what, start, end))

    def spans(self) -> list[TraceSpan]:
        """In order of their starts. Waits for the device, where it runs ahead."""
        recorded = list(self._recorded)
        if not recorded:
            return []
        origin = recorded[0][3]
        between = self._seconds_between
        spans = [TraceSpan(q, block, what, between(origin, a), between(origin, b)) for q, block, what, a, b in recorded]
        first = min(span.start_seconds for span in spans)
        moved = [s._replace(start_seconds=s.start_seconds - first, end_seconds=s.end_seconds - first) for s in spans]
        return sorted(moved, key=lambda span: span.start_seconds)
