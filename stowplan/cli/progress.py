"""How far a long search is: one line that changes on a terminal, a line now and then elsewhere. On stderr.

Ctrl-C ends a search, which then gives the best that it has found; a second one ends the command.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

from rich.console import Console

from stowplan.cli.terminal import say
from stowplan.core.units import format_bytes

__all__ = ["Tell", "packing_progress"]

_FIRST_SECONDS = 2.0  # a search that is over by then says nothing where it cannot take it back
_FACTOR = 1.5  # from one line's time to that of the next, at least


class Tell:
    """Called with numbers by a packer; says them on ``terminal``, or if it is time to, where there is none.

    Answers whether the search is to end.
    """

    def __init__(self, terminal: Console | None) -> None:
        self._status = None if terminal is None else terminal.status("packing", spinner="line")
        self._next_seconds = _FIRST_SECONDS
        self.stopped = False

    def shown(self) -> AbstractContextManager[object]:
        """The time in which the line is there."""
        return nullcontext() if self._status is None else self._status

    def __call__(self, height_bytes: int, bound_bytes: int, seconds: float) -> bool:
        gap = f"{height_bytes / bound_bytes - 1:.2%} above" if height_bytes > bound_bytes else "at"
        text = f"packing: {format_bytes(height_bytes)}, {gap} the bound, {seconds:.0f} s"
        if self._status is not None:
            self._status.update(text)
        elif seconds >= self._next_seconds:
            self._next_seconds = _FACTOR * seconds
            say(text)
        return self.stopped


@contextmanager
def packing_progress() -> Iterator[Tell]:
    """A ``Tell`` for stderr as it is, which the first Ctrl-C stops."""
    console = Console(stderr=True)
    tell = Tell(console if console.is_terminal else None)
    if threading.current_thread() is not threading.main_thread():  # where signals do not arrive
        with tell.shown():
            yield tell
        return

    def stop(number: int, frame: FrameType | None) -> None:
        tell.stopped = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        with tell.shown():
            yield tell
    finally:
        signal.signal(signal.SIGINT, before)
