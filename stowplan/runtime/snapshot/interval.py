"""How often snapshots are taken: Young's rule, in steps."""

from __future__ import annotations

import math

from stowplan.core.errors import InvalidArgument

__all__ = ["interval_seconds", "interval_steps"]


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
    chosen: int | None = None,
) -> int | None:
    """The same in steps, rounded up, at least 1; None: never, as nothing fails (an infinite MTBF).

    Args:
        cost_seconds, mtbf_seconds, least_seconds: as for ``interval_seconds``.
        step_seconds: how long a step takes.
        chosen: the user's own number of steps, which is taken as it is. When snapshots then take longer than that, the
            one who takes them skips some.

    Raises:
        InvalidArgument: as ``interval_seconds``; steps that take no time; a number of steps below 1.
    """
    if chosen is not None:
        if type(chosen) is not int or chosen < 1:
            raise InvalidArgument(f"a snapshot every {chosen!r} steps: give a whole number, 1 or more.")
        return chosen
    if not (math.isfinite(step_seconds) and step_seconds > 0):
        raise InvalidArgument(f"step_seconds={step_seconds!r}: give the time of a step in seconds, more than 0.")
    seconds = interval_seconds(cost_seconds, mtbf_seconds, least_seconds=least_seconds)
    return None if math.isinf(seconds) else max(1, math.ceil(seconds / step_seconds))
