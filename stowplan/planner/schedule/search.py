"""The fastest schedule that is found within a memory limit.

1. Named schedules that fit, and the best of other limits that is handed in.
2. Repeated blocks about as large as the limit, their ends pulled together within it.
3. The engine: the best of these again under the real times and capacities; blocks and plain priorities as keys.
4. Polish: keys are when the passes of the best begin, plus noise; what is not slower becomes the best.

All of it is counted in steps of work and drawn from a seed: the answer is the same on every machine, unless time runs
out before the steps do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stowplan.core.errors import InvalidArgument
from stowplan.core.schedule import Schedule
from stowplan.planner.schedule.bounds import published_bound_seconds, step_bound_seconds
from stowplan.planner.schedule.check import check
from stowplan.planner.schedule.costs import Costs
from stowplan.planner.schedule.hunt import Hunt
from stowplan.planner.schedule.limits import Limit
from stowplan.planner.schedule.simulate import Timeline

__all__ = ["Found", "search"]

_LEAST_STEPS, _STEPS_PER_PASS = 4_000_000, 40


@dataclass(frozen=True, eq=False)
class Found:
    """The best schedule that was found; nothing says that there is none better, but the bounds.

    Attributes:
        timeline: the schedule, when its actions run, and what they hold.
        origin: the name of the schedule, or how it was found.
        bound_seconds: no schedule takes less time.
        published_bound_seconds: the same from the paper on V shapes, where it applies; else 0.
        named_seconds: step time of each named schedule that fits.
    """

    timeline: Timeline
    origin: str
    bound_seconds: float
    published_bound_seconds: float
    named_seconds: dict[str, float]

    @property
    def schedule(self) -> Schedule:
        return self.timeline.schedule

    @property
    def gap(self) -> float:
        """How far the step is above the larger bound, as a share of that."""
        return self.timeline.step_seconds / max(self.bound_seconds, self.published_bound_seconds) - 1


def search(
    costs: Costs,
    num_devices: int,
    num_microbatches: int,
    *,
    limit_microbatches: int | None = None,
    limit_bytes: int | None = None,
    starts: Sequence[Schedule] = (),
    v_only: bool = False,
    steps: int | None = None,
    time_limit_seconds: float = 50.0,
    seed: int = 0,
) -> Found:
    """The fastest schedule found for ``costs`` of 2p stages within one limit, or without one.

    ``limit_microbatches``: activations, in microbatches' worth of one device. ``limit_bytes``: the peak of every
    device, buffers included. ``starts``: schedules to begin with, such as the best of a smaller limit. ``v_only``: no
    named schedules of another placement than the V. ``steps``: how much is tried: a pass that the engine places is one.

    Raises InfeasibleSchedule, which names the least limit that a schedule was found for, and InvalidArgument.
    """
    _refuse(costs, num_devices, num_microbatches, limit_microbatches, limit_bytes)
    limit = Limit(costs, num_devices, limit_microbatches, limit_bytes)
    if steps is None:
        steps = max(_LEAST_STEPS, _STEPS_PER_PASS * 6 * num_microbatches * num_devices)
    hunt = Hunt(limit, num_microbatches, steps, time_limit_seconds, seed, v_only)
    named_seconds = hunt.take_known(starts)
    bound = step_bound_seconds(
        costs, num_devices, num_microbatches, limit_microbatches=limit_microbatches, limit_bytes=limit_bytes
    )
    published = published_bound_seconds(costs, num_devices, num_microbatches, limit_microbatches)
    hunt.enough_seconds = max(bound, published)
    hunt.repeat_blocks()
    hunt.run_engine()
    hunt.polish()
    best = hunt.best
    check(best.timeline.schedule, limit_microbatches=limit_microbatches)
    return Found(best.timeline, best.origin, bound, published, named_seconds)


def _refuse(
    costs: Costs, num_devices: int, num_microbatches: int, limit_microbatches: int | None, limit_bytes: int | None
) -> None:
    for name, count in (
        ("num_devices", num_devices),
        ("num_microbatches", num_microbatches),
        ("limit_microbatches", limit_microbatches),
        ("limit_bytes", limit_bytes),
    ):
        if count is not None and (type(count) is not int or count < 1):
            raise InvalidArgument(f"{name}={count!r} is no number of them: give an int from 1 up.")
    if limit_microbatches is not None and limit_bytes is not None:
        raise InvalidArgument("limit_microbatches= and limit_bytes= are both given: give one of them.")
    if len(costs.stages) != 2 * num_devices:
        raise InvalidArgument(
            f"costs have {len(costs.stages)} stages: give {2 * num_devices}, two for each of {num_devices} devices."
        )
