"""Where a search begins: named schedules, blocks about as large as the limit, and keys for the engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product

from stowplan.core.errors import InvalidArgument
from stowplan.core.schedule import Action, Kind, Schedule
from stowplan.planner.schedule.costs import Costs
from stowplan.planner.schedule.engine import NUM_PASSES
from stowplan.planner.schedule.generate import NAMES, generate
from stowplan.planner.schedule.v_shapes import BLOCKS, PERIOD, Ticks, two_speed_block

__all__ = ["block_keys", "blocks_near", "named", "one_at_a_time", "priority_keys"]

# Ticks per way, up and back. V-Min goes (1, 1), V-Half (2, 1), V-ZB (4, 2); the others were found to make the best
# schedules between them.
_SPEEDS = ((1, 1), (1, 2), (1, 3), (2, 1), (2, 4), (3, 1), (4, 2))
_MOST_SWITCHES = 16
_NUM_PERIODS = 4
_SMALLER, _LARGER = 2.5, 0.6  # microbatches that a block may take less, or more, than the limit


def named(num_devices: int, num_microbatches: int) -> Iterator[tuple[str, Schedule]]:
    """Every schedule that has a name and is there for so many microbatches."""
    for name in NAMES:
        try:
            yield name, generate(name, num_devices, num_microbatches)
        except InvalidArgument:
            continue  # interleaved takes whole rounds


def one_at_a_time(stage_devices: tuple[int, ...], num_microbatches: int) -> Schedule:
    """One microbatch after the other, each stage's W right after its I, which takes least memory."""
    orders: list[list[Action]] = [[] for _ in range(max(stage_devices) + 1)]
    for microbatch in range(num_microbatches):
        for stage, device in enumerate(stage_devices):
            orders[device].append(Action(stage, Kind.FORWARD, microbatch))
        for stage in reversed(range(len(stage_devices))):
            for kind in (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT):
                orders[stage_devices[stage]].append(Action(stage, kind, microbatch))
    return Schedule(tuple(map(tuple, orders)), stage_devices, num_microbatches)


def blocks_near(num_devices: int, limit_microbatches: float, most: int) -> list[Ticks]:
    """At most ``most`` blocks, those first that come nearest to ``limit_microbatches`` when repeated."""
    p = num_devices
    least = (p + 1) / 3  # activations live for 4p + 4 ticks at least: less memory takes a longer period
    first = PERIOD if limit_microbatches >= least else math.ceil(PERIOD * least / limit_microbatches)
    periods = (PERIOD,) if first == PERIOD else range(first, first + _NUM_PERIODS)
    found: list[tuple[float, int, Ticks]] = [
        (abs(limit_microbatches - block.life_microbatches), -1, block)
        for block in (make(p) for make in BLOCKS.values())
    ]
    for period in periods:
        for block in _two_speed_blocks(p, period):
            room = limit_microbatches - block.life_microbatches
            if -_LARGER <= room <= _SMALLER:
                found.append((abs(room), len(found), block))
    return [block for _, _, block in sorted(found, key=lambda item: item[:2])[:most]]


@lru_cache(maxsize=16)
def _two_speed_blocks(num_devices: int, period: int) -> tuple[Ticks, ...]:
    p = num_devices
    switches = sorted({1 + round(i * (p - 2) / (_MOST_SWITCHES - 1)) for i in range(_MOST_SWITCHES)} & set(range(1, p)))
    blocks = []
    for near, far in product(_SPEEDS, repeat=2):
        for num_near in switches if near != far else switches[:1]:
            block = two_speed_block(p, near, far, num_near, period)
            if block is not None:
                blocks.append(block)
    return tuple(blocks)


def block_keys(block: Ticks, num_microbatches: int, costs: Costs) -> list[list[float]]:
    """Keys of a repeated block, whose tick is a sixth of a microbatch's time on the busiest device."""
    p = block.num_devices
    stages = costs.stages
    tick = max(stages[i].work_seconds + stages[2 * p - 1 - i].work_seconds for i in range(p)) / PERIOD
    period = tick * block.period
    return [
        [begin * tick + period * microbatch for microbatch in range(num_microbatches) for begin in (*begins, 0, 0)]
        for begins in block.begins.tolist()
    ]


def priority_keys(num_devices: int, num_microbatches: int) -> Iterator[list[list[float]]]:
    """Keys by which a kind of pass always goes before another, and microbatches in turn within it."""
    for ranks in ((3, 2, 1, 0), (2, 3, 1, 0), (3, 2, 0, 1), (1, 0, 0, 0)):
        row = [
            float(rank * num_microbatches * NUM_PASSES + microbatch)
            for microbatch in range(num_microbatches)
            for rank in (*ranks, 0, 0)
        ]
        yield [row] * num_devices
