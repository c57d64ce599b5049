"""How often snapshots are taken: Young's rule, in steps."""

from __future__ import annotations

import math
import time

from stowplan.core.errors import InvalidArgument

__all__ = ["Timetable", "interval_seconds", "interval_steps"]


def interval_seconds(cost_seconds: float, mtbf_seconds: float, *, least_seconds: float = 0.0) -> float:
    """The time between two snapshots that loses the least time: √(2 · cost · MTBF), and never less than one takes.

    Source: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974.

    Args:
        cost_seconds: for how long a snapshot stops training.
        mtbf_seconds: mean time between failures of the whole job: of one node, divided by the number of nodes.
        least_seconds: what one snapshot takes until it is safe (copy and coding), beside training or not.

    Raises:
        InvalidArgument: a time that is negative or no number, or an MTBF of zero.
    """
    for name, seconds in (("cost_seconds", cost_seconds), ("least_seconds", least_seconds)):
        if not (math.isfinite(seconds) and seconds >= 0):
            raise InvalidArgument(f"{name}={seconds!r}: give a time in seconds, 0 or more.")
    if not mtbf_seconds > 0:
        raise InvalidArgument(
            f"mtbf_seconds={mtbf_seconds!r}: give the job's mean time between failures in seconds, more than 0."
        )
    if math.isinf(mtbf_seconds):
        return math.inf
    return max(math.sqrt(2 * cost_seconds * mtbf_seconds), least_seconds)


def interval_steps(
    cost_seconds: float,
    mtbf_seconds: float,
    *,
    step_seconds: float,
    least_seconds: float = 0.0,
) -> int | None:
    """The same in steps, rounded up, at least 1; None: never, as nothing fails (an infinite MTBF).

    Args:
        cost_seconds, mtbf_seconds, least_seconds: as for ``interval_seconds``.
        step_seconds: how long a step takes.

    Raises:
        InvalidArgument: as ``interval_seconds``; steps that take no time.
    """
    if not (math.isfinite(step_seconds) and step_seconds > 0):
        raise InvalidArgument(f"step_seconds={step_seconds!r}: give the time of a step in seconds, more than 0.")
    seconds = interval_seconds(cost_seconds, mtbf_seconds, least_seconds=least_seconds)
    return None if math.isinf(seconds) else max(1, math.ceil(seconds / step_seconds))


class Timetable:
    """When a snapshot is due: each time, every so many steps, or by Young's rule from what is measured.

    ``interval`` is in steps; None: no more are taken. When snapshots take longer than that, those who take them skip
    some.

    Raises InvalidArgument: an interval below 1, an MTBF that is not above 0, or both of them.
    """

    def __init__(self, interval: int | None = None, mtbf_seconds: float | None = None) -> None:
        if interval is not None and mtbf_seconds is not None:
            raise InvalidArgument("interval= and mtbf_seconds= were both given: the second is to choose the first.")
        if mtbf_seconds is not None:
            interval_seconds(0.0, mtbf_seconds)
        if interval is not None and (type(interval) is not int or interval < 1):
            raise InvalidArgument(f"interval={interval!r}: give a whole number of steps, 1 or more.")
        self.interval: int | None = interval or 1
        self._mtbf_seconds = mtbf_seconds
        self._next: int | None = 0
        self._resumed: tuple[int, float] | None = None
        self._num_steps, self._seconds = 0, 0.0

    def due(self, step: int) -> bool:
        """Whether one is to be taken after ``step`` steps."""
        if self._mtbf_seconds is None:
            return not step % (self.interval or 1)
        return self._next is not None and step >= self._next

    def plan(
        self, step: int, cost_seconds: float | None, least_seconds: float | None, step_seconds: float | None
    ) -> None:
        """One is taken now; when the next one is due, with what is known of the last. Until all is known: at once."""
        if self._mtbf_seconds is None or cost_seconds is None or not step_seconds:
            return
        self.interval = interval_steps(
            cost_seconds, self._mtbf_seconds, step_seconds=step_seconds, least_seconds=least_seconds or 0.0
        )
        self._next = None if self.interval is None else step + self.interval

    # ---- what steps take ----
    def pause(self, step: int) -> None:
        """``step`` steps are over."""
        if self._resumed is not None and step > self._resumed[0]:
            self._num_steps += step - self._resumed[0]
            self._seconds += time.monotonic() - self._resumed[1]

    def resume(self, step: int) -> None:
        """The step after ``step`` steps begins."""
        self._resumed = step, time.monotonic()

    @property
    def step_seconds(self) -> float | None:
        """The mean, without what snapshots take; None before the first one was seen."""
        return self._seconds / self._num_steps if self._num_steps else None
