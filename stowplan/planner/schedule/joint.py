"""A schedule, and for each stage one of several ways to hold its activations, chosen together.

A stage's menu has its costs when everything is kept, and under activation plans that hold less and take longer. Less
memory for a microbatch lets more of them be in flight: which of both is worth more depends on the schedule. So levels
of the menus are tried, one for all stages or, in a V, one for each way (what goes in first waits longest), each with
the best schedule that is found for it within the limit, unless no schedule can make it the fastest. The best few are
improved stage by stage.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from stowplan.core.errors import InfeasibleSchedule
from stowplan.core.schedule import Schedule, v_placement
from stowplan.planner.schedule.bounds import step_bound_seconds
from stowplan.planner.schedule.candidates import named, one_at_a_time
from stowplan.planner.schedule.costs import Costs, StageCosts
from stowplan.planner.schedule.search import search
from stowplan.planner.schedule.simulate import Timeline, simulate

__all__ = ["Choice", "Trial", "choose"]

_STEPS = 200_000  # of each search
_NUM_IMPROVED = 2


@dataclass(frozen=True)
class Trial:
    """What came out with all stages of each half of the model on one level of their menus.

    Attributes:
        levels: of the first half and of the second; 0 keeps everything, each next one holds less.
        origin: the schedule's name, or how it was found; empty where none fits.
        step_seconds, peak_bytes: of that schedule, 0 seconds where none fits, with the least peak that was found.
    """

    levels: tuple[int, int]
    origin: str
    step_seconds: float
    peak_bytes: int


@dataclass(frozen=True, eq=False)
class Choice:
    """The fastest combination that was found.

    Attributes:
        levels: of each stage, into its menu.
        timeline: the schedule under the costs of these.
        origin: where the schedule is from.
        trials: what was tried, the least work first.
    """

    levels: tuple[int, ...]
    timeline: Timeline
    origin: str
    trials: tuple[Trial, ...]

    @property
    def schedule(self) -> Schedule:
        return self.timeline.schedule


def choose(
    menus: Sequence[Sequence[StageCosts]],
    stage_devices: tuple[int, ...],
    num_microbatches: int,
    limit_bytes: int,
    *,
    splits_backward: bool = True,
    communication_seconds: float = 0.0,
    steps: int = _STEPS,
    time_limit_seconds: float = 30.0,
) -> Choice:
    """The fastest schedule and levels found for stages that are placed on ``stage_devices``.

    ``limit_bytes``: of each device, for all that ``StageCosts`` counts. In a V schedules are searched for; in other
    placements the named ones compete, those that put weight gradients off as the menus were measured with
    (``splits_backward``).

    Raises InfeasibleSchedule, which names the least limit that something was found for.
    """
    deadline = time.monotonic() + time_limit_seconds
    found: list[Choice] = []
    trials: list[Trial] = []
    num_devices = max(stage_devices) + 1
    in_v = stage_devices == v_placement(num_devices)
    job = _Job(stage_devices, num_microbatches, limit_bytes, steps, splits_backward)
    halves = list(_halves(menus, stage_devices, communication_seconds))
    for number, (pair, levels, costs) in enumerate(halves):
        bound = step_bound_seconds(costs, num_devices, num_microbatches) if in_v else 0.0
        if found and bound >= min(choice.timeline.step_seconds for choice in found):
            continue
        seconds = max(0.1, (deadline - time.monotonic()) / (len(halves) - number + 1))
        try:
            choice = job.scheduled(costs, levels, seconds, [other.schedule for other in found])
        except InfeasibleSchedule as error:
            trials.append(Trial(pair, "", 0.0, error.least_bytes))
            continue
        found.append(choice)
        timeline = choice.timeline
        trials.append(Trial(pair, choice.origin, timeline.step_seconds, max(timeline.peaks_bytes)))
    if not found:
        raise InfeasibleSchedule(limit_bytes, min(trial.peak_bytes for trial in trials))
    found.sort(key=lambda choice: choice.timeline.step_seconds)
    improved = [_improved(choice, menus, limit_bytes) for choice in found[:_NUM_IMPROVED]]
    best = min(improved, key=lambda choice: choice.timeline.step_seconds)
    return Choice(best.levels, best.timeline, best.origin, tuple(trials))


def _halves(
    menus: Sequence[Sequence[StageCosts]], stage_devices: tuple[int, ...], communication_seconds: float
) -> list[tuple[tuple[int, int], tuple[int, ...], Costs]]:
    """(levels of both halves, those of all stages, costs), the least work first."""
    num_stages, every = len(menus), range(max(map(len, menus)))
    in_v = stage_devices == v_placement(max(stage_devices) + 1)
    made = []
    for pair in product(every, every) if in_v else zip(every, every, strict=True):
        wanted = [pair[2 * stage >= num_stages] for stage in range(num_stages)]
        levels = tuple(min(level, len(menu) - 1) for level, menu in zip(wanted, menus, strict=True))
        made.append((pair, levels, _costs(menus, levels, communication_seconds)))
    return sorted(made, key=lambda item: sum(stage.work_seconds for stage in item[2].stages))


def _costs(menus: Sequence[Sequence[StageCosts]], levels: Sequence[int], communication_seconds: float) -> Costs:
    stages = tuple(menu[level] for menu, level in zip(menus, levels, strict=True))
    return Costs(stages, communication_seconds)


@dataclass(frozen=True)
class _Job:
    """What schedules are looked for."""

    stage_devices: tuple[int, ...]
    num_microbatches: int
    limit_bytes: int
    steps: int
    splits_backward: bool

    def scheduled(
        self, costs: Costs, levels: tuple[int, ...], time_limit_seconds: float, starts: Sequence[Schedule]
    ) -> Choice:
        """The best schedule found for ``costs``. Raises InfeasibleSchedule."""
        num_devices = max(self.stage_devices) + 1
        if self.stage_devices == v_placement(num_devices):
            found = search(
                costs,
                num_devices,
                self.num_microbatches,
                limit_bytes=self.limit_bytes,
                starts=starts,
                v_only=True,
                steps=self.steps,
                time_limit_seconds=time_limit_seconds,
            )
            origin = "search" if found.origin == "start" else found.origin  # another level's
            return Choice(levels, found.timeline, origin, ())
        timelines = [(simulate(schedule, costs), name) for name, schedule in self._known()]
        fitting = [(timeline, name) for timeline, name in timelines if max(timeline.peaks_bytes) <= self.limit_bytes]
        if not fitting:
            raise InfeasibleSchedule(self.limit_bytes, min(max(timeline.peaks_bytes) for timeline, _ in timelines))
        timeline, name = min(fitting, key=lambda item: item[0].step_seconds)
        return Choice(levels, timeline, name, ())

    def _known(self) -> Iterator[tuple[str, Schedule]]:
        for name, schedule in named(max(self.stage_devices) + 1, self.num_microbatches):
            if schedule.stage_devices == self.stage_devices and schedule.splits_backward == self.splits_backward:
                yield name, schedule
        alone = one_at_a_time(self.stage_devices, self.num_microbatches)
        yield "one at a time", alone if self.splits_backward else alone.joined()


def _improved(choice: Choice, menus: Sequence[Sequence[StageCosts]], limit_bytes: int) -> Choice:
    """Change one stage's level at a time, under the same schedule, as long as the step gets shorter."""
    communication_seconds = choice.timeline.costs.communication_seconds
    better = True
    while better:
        better = False
        for stage, menu in enumerate(menus):
            for level in range(len(menu)):
                if level == choice.levels[stage]:
                    continue
                levels = (*choice.levels[:stage], level, *choice.levels[stage + 1 :])
                timeline = simulate(choice.schedule, _costs(menus, levels, communication_seconds))
                fits = max(timeline.peaks_bytes) <= limit_bytes
                if fits and _rank(timeline) < _rank(choice.timeline):
                    choice = Choice(levels, timeline, choice.origin, ())
                    better = True
    return choice


def _rank(timeline: Timeline) -> tuple[float, float]:
    """Shorter steps first; then less work, which a slower device would have to do."""
    return timeline.step_seconds, sum(timeline.work_seconds)
