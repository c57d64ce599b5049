"""The search itself: what has been found so far, and how much may still be tried."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from stowplan.core.errors import InfeasibleSchedule
from stowplan.core.schedule import Schedule, loop_placement, v_placement
from stowplan.planner.schedule.candidates import block_keys, blocks_near, named, one_at_a_time, priority_keys
from stowplan.planner.schedule.engine import Rule, Run, Steps, keys_of, run
from stowplan.planner.schedule.limits import Limit
from stowplan.planner.schedule.simulate import Timeline
from stowplan.planner.schedule.v_shapes import Ticks, v_schedule

__all__ = ["Entry", "Hunt"]

_BLOCK_SHARE, _ENGINE_SHARE = 0.35, 0.25  # of all steps; the rest is for polish
_BLOCK_STEPS = 2  # of the engine's steps that a pass takes when a block is pulled together and simulated
_MOST_BLOCKS, _NUM_BLOCK_KEYS = 64, 4
_NUM_LEADERS = 3
_SLACK = 1.1  # how much slower than the best a schedule may be to be worth keeping
_RULES = tuple(Rule(*flags) for flags in product((True, False), (0, 1, 2), (0.0, 0.5, 1.0)))
_FIRST_RULES = (Rule(True, 0, 0.0), Rule(False, 1, 0.0), Rule(False, 1, 0.5), Rule(True, 0, 0.5))
_NOISE = (0.3, 0.6, 1.0, 2.0)  # in ticks
_MOST_MARGINS = 3
_SAME = 1e-9  # relative: two times that differ by rounding only


@dataclass(frozen=True, eq=False)
class Entry:
    """A schedule that fits: when it runs, and where it is from."""

    timeline: Timeline
    origin: str

    @property
    def step_seconds(self) -> float:
        return self.timeline.step_seconds


class Hunt:
    """What has been found so far, and how much may still be tried."""

    def __init__(
        self,
        limit: Limit,
        num_microbatches: int,
        steps: int,
        time_limit_seconds: float,
        seed: int,
        v_only: bool = False,
    ) -> None:
        self.limit, self.num_microbatches, self.v_only = limit, num_microbatches, v_only
        self.num_devices = limit.num_devices
        self.num_passes = 6 * num_microbatches * limit.num_devices
        self.all_steps = steps
        self.steps = Steps(steps)
        self.deadline = time.monotonic() + time_limit_seconds
        self.random = np.random.default_rng(seed)
        self.entries: list[Entry] = []
        self.enough_seconds = 0.0
        self.least_bytes = sys.maxsize  # the lowest peak of what was simulated, whether it fits or not

    @property
    def best(self) -> Entry:
        return min(self.entries, key=lambda entry: entry.step_seconds)

    @property
    def over(self) -> bool:
        return (
            self.steps.left <= 0
            or time.monotonic() > self.deadline
            or self.best.step_seconds <= self.enough_seconds * (1 + _SAME)
        )

    def take(self, schedule: Schedule, origin: str) -> float | None:
        """Keep ``schedule`` if it fits; its step time, or None."""
        timeline = self.limit.timeline(schedule)
        self.least_bytes = min(self.least_bytes, max(timeline.peaks_bytes))
        if not self.limit.holds(timeline):
            return None
        self.entries.append(Entry(timeline, origin))
        return timeline.step_seconds

    def take_known(self, starts: Sequence[Schedule]) -> dict[str, float]:
        """Named schedules, starts, and one microbatch at a time. Raises InfeasibleSchedule if none of them fits."""
        p, m = self.num_devices, self.num_microbatches
        named_seconds = {}
        for name, schedule in named(p, m):
            if self.v_only and schedule.stage_devices != v_placement(p):
                continue
            seconds = self.take(schedule, name)
            if seconds is not None:
                named_seconds[name] = seconds
        for start in starts:
            self.take(start, "start")
        for placement in (v_placement(p), loop_placement(p, 2), loop_placement(p)):
            if placement == v_placement(p) or not (self.entries or self.v_only):
                self.take(one_at_a_time(placement, m), "one at a time")
        if not self.entries:
            assert self.limit.limit_bytes is not None  # one microbatch fits one microbatch
            raise InfeasibleSchedule(self.limit.limit_bytes, self.least_bytes)
        return named_seconds

    def repeat_blocks(self) -> None:
        """Repeat blocks about as large as the limit: all with few microbatches, the best of them with all."""
        least = self.steps.left - int(_BLOCK_SHARE * self.all_steps)
        few = min(self.num_microbatches, 2 * self.num_devices)
        ranked: list[tuple[float, int, Ticks, int]] = []
        for room in self.limit.room_microbatches(self.num_microbatches):
            near = min(room, self.num_devices + 1)
            for block in blocks_near(self.num_devices, near, _MOST_BLOCKS):
                if self.over or self.steps.left < least:
                    break
                schedule = self._repeated(block, few, int(2 * room))
                timeline = self.limit.timeline(schedule)
                if self.limit.holds(timeline):
                    ranked.append((timeline.step_seconds, len(ranked), block, int(2 * room)))
                    if few == self.num_microbatches:
                        self.entries.append(Entry(timeline, "repeated block"))
        if few < self.num_microbatches:
            for _, _, block, most in sorted(ranked, key=lambda item: item[:2])[:_NUM_LEADERS]:
                self.take(self._repeated(block, self.num_microbatches, most), "repeated block")

    def _repeated(self, block: Ticks, num_microbatches: int, most_activations: int) -> Schedule:
        self.steps.left -= _BLOCK_STEPS * 6 * num_microbatches * self.num_devices
        return v_schedule(block, num_microbatches, most_activations=most_activations)

    def run_engine(self) -> None:
        """Let the engine follow the leaders, blocks and plain priorities, by some rules."""
        least = self.steps.left - int(_ENGINE_SHARE * self.all_steps)
        for rule, keys in product(_FIRST_RULES, list(self._seeds())):
            if self.over or self.steps.left < least:
                return
            made = self._follow(keys, rule, _SLACK * self.best.step_seconds)
            if made is not None:
                self._keep(made)

    def _seeds(self) -> Iterator[list[list[float]]]:
        for entry in self._leaders():
            yield keys_of(entry.timeline)
        for room in self.limit.room_microbatches(self.num_microbatches):
            for block in blocks_near(self.num_devices, min(room, self.num_devices + 1), _NUM_BLOCK_KEYS):
                yield block_keys(block, self.num_microbatches, self.limit.costs)
        yield from priority_keys(self.num_devices, self.num_microbatches)

    def _leaders(self) -> list[Entry]:
        """The best entries in a V with different step times."""
        placement = v_placement(self.num_devices)
        leaders: dict[float, Entry] = {}
        for entry in sorted(self.entries, key=lambda entry: entry.step_seconds):
            if entry.timeline.schedule.stage_devices == placement:
                leaders.setdefault(entry.step_seconds, entry)
        return list(leaders.values())[:_NUM_LEADERS]

    def _keep(self, made: Run) -> None:
        timeline = self.limit.timeline(made.schedule(self.num_microbatches))
        assert self.limit.holds(timeline)
        self.entries.append(Entry(timeline, "search"))

    def _follow(self, keys: list[list[float]], rule: Rule, within_seconds: float) -> Run | None:
        """What the engine makes of ``keys``, if it fits; with less memory where buffers need some."""
        margin_bytes = 0
        for _ in range(_MOST_MARGINS):
            pipeline = self.limit.pipeline(self.num_microbatches, margin_bytes)
            made = run(pipeline, keys, rule, self.steps, within_seconds)
            if made is None or not self.limit.has_buffers:
                return made
            over = self.limit.bytes_over(self.limit.timeline(made.schedule(self.num_microbatches)))
            if over <= 0:
                return made
            margin_bytes += over
        return None

    def polish(self) -> None:
        """Follow when the passes of a leader begin, with noise, as long as there are steps; leaders take turns."""
        leaders = [(entry.step_seconds, keys_of(entry.timeline)) for entry in self._leaders()]
        made: list[Run | None] = [None] * len(leaders)
        best_seconds = self.best.step_seconds
        plain_turns = len(leaders) * len(_RULES)
        turn = 0
        while leaders and not self.over and best_seconds > self.enough_seconds * (1 + _SAME):
            place = turn % len(leaders)
            seconds, keys = leaders[place]
            if turn < plain_turns:
                rule = _RULES[turn // len(leaders)]
            else:
                rule = _RULES[int(self.random.integers(len(_RULES)))]
                keys = self._shaken(keys)
            found = self._follow(keys, rule, seconds)
            if found is not None:
                leaders[place] = found.step_seconds, found.keys(self.num_microbatches)
                made[place] = found
                best_seconds = min(best_seconds, found.step_seconds)
            turn += 1
        for found in made:
            if found is not None:
                self._keep(found)

    def _shaken(self, keys: list[list[float]]) -> list[list[float]]:
        """``keys`` with noise: for each pass, or the same for all passes of a device that are of a kind."""
        tick = max(self.best.timeline.work_seconds) / (6 * self.num_microbatches)
        noise = tick * float(self.random.choice(_NOISE))
        shape: tuple[int, ...] = (self.num_devices, self.num_microbatches, 6)
        if self.random.random() < 0.5:
            shape = (self.num_devices, 1, 6)
        table = np.array(keys).reshape(self.num_devices, self.num_microbatches, 6)
        shaken: list[list[float]] = (
            (table + self.random.normal(0.0, noise, shape)).reshape(self.num_devices, -1).tolist()
        )
        return shaken
