"""How far a long search is: one line that changes on a terminal, a line now and then elsewhere. On stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console

from stowplan.cli.terminal import say
from stowplan.core.units import format_bytes

__all__ = ["Tell", "packing_progress"]

_FIRST_SECONDS = 2.0  # a search that is over by then says nothing where it cannot take it back
_FACTOR = 1.5  # from one line's time to that of the next, at least


class Tell:
    """Called with numbers by a packer; says them on ``terminal``, or if it is time to, where there is none."""

    def __init__(self, terminal: Console | None) -> None:
        self._status = None if terminal is None else terminal.status("packing", spinner="line")
        self._next_seconds = _FIRST_SECONDS

    def shown(self) -> AbstractContextManager[object]:
        """The time in which the line is there."""
        return nullcontext() if self._status is None else self._status

    def __call__(self, height_bytes: int, bound_bytes: int, seconds: float) -> None:
        gap = f"{height_bytes / bound_bytes - 1:.2%} above" if height_bytes > bound_bytes else "at"
        text = f"packing: {format_bytes(height_bytes)}, {gap} the bound, {seconds:.0f} s"
        if self._status is not None:
            self._status.update(text)
        elif seconds >= self._next_seconds:
            self._next_seconds = _FACTOR * seconds
            say(text)


@contextmanager
def packing_progress() -> Iterator[Tell]:
    """A ``Tell`` for stderr as it is."""
    console = Console(stderr=True)
    tell = Tell(console if console.is_terminal else None)
    with tell.shown():
        yield tell
