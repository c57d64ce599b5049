"""An event-driven list scheduler for two stages a device in a V, within a memory limit; driven by priorities.

A device that is free takes, among its next passes, the one of least key that can begin: its tensor is there, and so is
the memory. Weight gradients fill the gaps, the oldest first. Good keys are when passes begin in a good schedule, so the
engine turns one schedule into another: for other times, for another limit, or with noise for a better one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from stowplan.core.schedule import Kind, Schedule, v_placement
from stowplan.planner.schedule.coding import F, I, W, decode
from stowplan.planner.schedule.costs import Costs
from stowplan.planner.schedule.simulate import Timeline

__all__ = ["Pipeline", "Rule", "Run", "Steps", "keys_of", "run"]

# Passes of a device, and the code of one is NUM_PASSES · microbatch + pass.
F0, F1, I0, I1, W0, W1 = range(6)
NUM_PASSES = 6
_SETUP = 4  # a run that ends at once takes as long as this part of a whole one
_FIRST_PASS = {Kind.FORWARD: F0, Kind.INPUT_GRADIENT: I0, Kind.WEIGHT_GRADIENT: W0, Kind.BACKWARD: I0}


class Rule(NamedTuple):
    """How the engine chooses.

    Attributes:
        strict: a device waits for the pass of least key instead of taking another.
        reserve: for how many forward passes of its second stage a device leaves memory before one of its first.
        patience: a weight gradient is put off if another pass can begin within this share of its time.
    """

    strict: bool = False
    reserve: int = 1
    patience: float = 0.0


class Pipeline:
    """Stages, microbatches and capacities as tables by device and pass."""

    def __init__(self, costs: Costs, num_microbatches: int, capacities: list[float]) -> None:
        self.num_devices = p = len(capacities)
        self.num_microbatches = num_microbatches
        self.capacities = capacities
        self.communication_seconds = costs.communication_seconds
        pairs = [(costs.stages[i], costs.stages[2 * p - 1 - i]) for i in range(p)]
        self.seconds = [[stage.seconds[kind] for kind in (F, I, W) for stage in pair] for pair in pairs]
        self.work_seconds = [num_microbatches * sum(seconds) for seconds in self.seconds]
        self.after: list[list[int]] = []  # change of held bytes
        self.least_room: list[list[int]] = []  # what must be free for a pass to begin, so that others can follow
        self.forward_room: list[int] = []  # what a first forward pass leaves for the second one
        self.second_held: list[int] = []
        for first, second in pairs:
            added = [stage.input_gradient_bytes for stage in (first, second)]
            held = [stage.forward_bytes for stage in (first, second)]
            while_forward = [stage.forward_bytes + stage.transient_bytes[F] for stage in (first, second)]
            while_weight = [stage.transient_bytes[W] for stage in (first, second)]
            while_input = [
                max(stage.transient_bytes[I], stage.input_gradient_bytes + stage.transient_bytes[I], more + weight)
                for stage, more, weight in zip((first, second), added, while_weight, strict=True)
            ]
            backward = max(*while_input, *while_weight)
            second_room = max(while_forward[1], held[1] + backward)
            self.after.append([*held, *added, *(-h - a for h, a in zip(held, added, strict=True))])
            self.least_room.append([while_forward[0], second_room, *while_input, *while_weight])
            self.forward_room.append(held[0] + second_room)
            self.second_held.append(held[1])


@dataclass(frozen=True, slots=True)
class Run:
    """What the engine made: the codes of each device in order, when they begin, and when all is over."""

    orders: list[list[int]]
    begins: list[list[float]]
    step_seconds: float

    def keys(self, num_microbatches: int) -> list[list[float]]:
        """When passes begin, as keys for the next run."""
        keys = []
        for order, begins in zip(self.orders, self.begins, strict=True):
            row = [0.0] * (NUM_PASSES * num_microbatches)
            for code, begin in zip(order, begins, strict=True):
                row[code] = begin
            keys.append(row)
        return keys

    def schedule(self, num_microbatches: int) -> Schedule:
        """The same as a schedule."""
        p = len(self.orders)
        rows = [[kind * 2 * p + stage for kind in (F, I, W) for stage in (i, 2 * p - 1 - i)] for i in range(p)]
        orders = [
            [row[code % NUM_PASSES] * num_microbatches + code // NUM_PASSES for code in order]
            for row, order in zip(rows, self.orders, strict=True)
        ]
        return decode(orders, v_placement(p), num_microbatches)


def keys_of(timeline: Timeline) -> list[list[float]]:
    """Keys from when the passes of a V-shaped schedule begin, by device and code (B counts as I)."""
    schedule = timeline.schedule
    p = schedule.num_devices
    keys = []
    for order, begins in zip(schedule.orders, timeline.begins, strict=True):
        row = [0.0] * (NUM_PASSES * schedule.num_microbatches)
        for (stage, kind, microbatch), begin in zip(order, begins.tolist(), strict=True):
            row[NUM_PASSES * microbatch + _FIRST_PASS[kind] + (stage >= p)] = begin
        keys.append(row)
    return keys


class Steps:
    """Counts what the engine does, so that a search ends at the same place on every machine."""

    def __init__(self, most: int) -> None:
        self.left = most


def run(  # noqa: PLR0912, PLR0915 - one loop that sees every pass; calls would take most of its time
    pipeline: Pipeline, keys: list[list[float]], rule: Rule, steps: Steps, within_seconds: float = math.inf
) -> Run | None:
    """A schedule by ``keys`` [device][code], or None: it would take longer than ``within_seconds``, or never end."""
    p, m, delay = pipeline.num_devices, pipeline.num_microbatches, pipeline.communication_seconds
    strict, reserve, patience = rule
    ends = [[-1.0] * (NUM_PASSES * m) for _ in range(p)]
    sources = _sources(p, ends, delay)
    heads = [[F0, F1, I0, I1] for _ in range(p)]  # the next code of each
    weights: list[list[int]] = [[] for _ in range(p)]
    next_weight, held, free = [0] * p, [0] * p, [0.0] * p
    remaining = list(pipeline.work_seconds)
    orders: list[list[int]] = [[] for _ in range(p)]
    begins: list[list[float]] = [[] for _ in range(p)]
    rooms = _rooms(pipeline, reserve)
    last = NUM_PASSES * m
    left = p * last
    allowed = within_seconds * (1 + 1e-12)
    events = [(0.0, device) for device in range(p)]
    while events:
        now, device = heappop(events)
        if free[device] > now:
            continue
        mine, source, room = keys[device], sources[device], rooms[device]
        space = pipeline.capacities[device] - held[device]
        pick, least, soonest = -1, math.inf, math.inf
        wanted = heads[device]
        if strict:
            wanted = [min((code for code in wanted if code < last), key=mine.__getitem__, default=last)]
        for code in wanted:
            if code >= last:
                continue
            key = mine[code]
            if key >= least:
                continue
            kind = code % NUM_PASSES
            end_of, shift, travel = source[kind]
            if end_of is not None:
                arrival = end_of[code + shift]
                if arrival < 0:
                    continue
                arrival += travel
                if arrival > now:
                    if arrival < soonest and room[kind] <= space:
                        soonest = arrival
                    continue
            if room[kind] <= space:
                pick, least = code, key
        seconds = pipeline.seconds[device]
        if pick < 0:
            waiting, number = weights[device], next_weight[device]
            if number == len(waiting):
                continue
            pick = waiting[number]
            if soonest - now < patience * seconds[pick % NUM_PASSES]:
                continue
            next_weight[device] += 1
            kind = pick % NUM_PASSES
        else:
            kind = pick % NUM_PASSES
            heads[device][kind] += NUM_PASSES
            if kind >= I0:
                weights[device].append(pick + 2)
        end = now + seconds[kind]
        remaining[device] -= seconds[kind]
        if end + remaining[device] > allowed:
            break
        held[device] += pipeline.after[device][kind]
        ends[device][pick] = free[device] = end
        orders[device].append(pick)
        begins[device].append(now)
        left -= 1
        heappush(events, (end, device))
        if kind < W0:
            other = device + 1 if kind in (F0, I1) else device - 1
            if 0 <= other < p and free[other] <= end + delay:
                heappush(events, (end + delay, other))
    steps.left -= p * last - left + p * last // _SETUP
    return None if left else Run(orders, begins, max(free))


_Source = tuple[list[float] | None, int, float]


def _sources(p: int, ends: list[list[float]], delay: float) -> list[tuple[_Source, _Source, _Source, _Source]]:
    """For F0, F1, I0, I1 of each device: whose ends, at which code from the pass's own, and how long it travels."""
    found: list[tuple[_Source, _Source, _Source, _Source]] = []
    for device in range(p):
        below: tuple[list[float], float] | None = (ends[device - 1], delay) if device else None
        above: tuple[list[float], float] | None = (ends[device + 1], delay) if device < p - 1 else None
        own = ends[device]
        found.append(
            (
                (below[0], 0, below[1]) if below else (None, 0, 0.0),
                (above[0], 0, above[1]) if above else (own, F0 - F1, 0.0),
                (above[0], 0, above[1]) if above else (own, I1 - I0, 0.0),
                (below[0], 0, below[1]) if below else (own, F1 - I1, 0.0),
            )
        )
    return found


def _rooms(pipeline: Pipeline, reserve: int) -> list[list[int]]:
    """What must be free for each pass to begin. With a reserve of 1 or more no device can block itself."""
    made = []
    for room, forward, second in zip(pipeline.least_room, pipeline.forward_room, pipeline.second_held, strict=True):
        first = max(room[F0], forward + (reserve - 1) * second) if reserve else room[F0]
        made.append([first, *room[F1:]])
    return made
