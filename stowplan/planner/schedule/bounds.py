"""What no schedule can beat."""

from __future__ import annotations

import math

from stowplan.core.schedule import loop_placement, v_placement
from stowplan.planner.schedule.costs import Costs

__all__ = ["published_bound_seconds", "step_bound_seconds"]


def step_bound_seconds(
    costs: Costs,
    num_devices: int,
    num_microbatches: int,
    *,
    limit_microbatches: int | None = None,
    limit_bytes: int | None = None,
) -> float:
    """Seconds that every schedule of these 2p stages takes, in a V, in a loop, or merged to one a device.

    The largest of three: a device computes all its work after its first input has come; a microbatch goes through all
    stages and back; and within a limit, bytes x seconds that activations take (each lives at least for the way from its
    stage to the end and back) are at most bytes x step on each device.
    """
    p = num_devices
    limits = (limit_microbatches, limit_bytes)
    merged = costs.merged(2)
    return min(
        _of_placement(costs, v_placement(p), num_microbatches, limits),
        _of_placement(costs, loop_placement(p, 2), num_microbatches, limits),
        _of_placement(merged, loop_placement(p), num_microbatches, limits),
    )


def published_bound_seconds(
    costs: Costs, num_devices: int, num_microbatches: int, limit_microbatches: int | None
) -> float:
    """The bound of "Pipeline Parallelism with Controllable Memory" for V shapes: a bubble of 6p−1−6k passes.

    It is for k microbatches in memory, passes of equal time, and more microbatches than a pipeline holds; 0 elsewhere.
    """
    times = {seconds for stage in costs.stages for seconds in stage.seconds}
    if len(times) > 1 or costs.communication_seconds or limit_microbatches is None:
        return 0.0
    if num_microbatches < 2 * num_devices:
        return 0.0
    (tick,) = times
    bubble = max(num_devices - 1, 6 * num_devices - 1 - 6 * limit_microbatches)
    return (6 * num_microbatches + bubble) * tick


def _of_placement(
    costs: Costs, stage_devices: tuple[int, ...], num_microbatches: int, limits: tuple[int | None, int | None]
) -> float:
    stages = costs.stages
    last = len(stages) - 1
    hops = [costs.communication_seconds * (stage_devices[stage] != stage_devices[stage + 1]) for stage in range(last)]
    arrival = [0.0] * len(stages)
    for stage in range(last):
        arrival[stage + 1] = arrival[stage] + stages[stage].forward_seconds + hops[stage]
    return_seconds = [0.0] * len(stages)  # from the begin of F to the end of I
    beyond = 0.0
    for stage in range(last, -1, -1):
        beyond += stages[stage].forward_seconds + stages[stage].input_gradient_seconds
        return_seconds[stage] = beyond
        beyond += 2 * hops[stage - 1] if stage else 0.0
    bound = return_seconds[0] + stages[0].weight_gradient_seconds
    for device in range(max(stage_devices) + 1):
        mine = [stage for stage, holder in enumerate(stage_devices) if holder == device]
        work = num_microbatches * sum(stages[stage].work_seconds for stage in mine)
        bound = max(bound, min(arrival[stage] for stage in mine) + work)
        room, unit = _room(costs, mine, limits)
        if room < math.inf:
            area = sum(_area(costs, stage, return_seconds[stage], unit) for stage in mine)
            bound = max(bound, num_microbatches * area / room)
    return bound


def _room(costs: Costs, mine: list[int], limits: tuple[int | None, int | None]) -> tuple[float, bool]:
    """(what activations may take on a device, whether each counts as 1 and not its bytes)."""
    limit_microbatches, limit_bytes = limits
    if limit_microbatches is not None:
        return limit_microbatches * len(mine), True
    if limit_bytes is not None:
        return max(1, limit_bytes - sum(costs.stages[stage].static_bytes for stage in mine)), False
    return math.inf, True


def _area(costs: Costs, stage: int, return_seconds: float, unit: bool) -> float:
    cost = costs.stages[stage]
    held = 1 if unit else cost.forward_bytes
    with_gradient = held if unit else held + cost.input_gradient_bytes
    return held * return_seconds + with_gradient * cost.weight_gradient_seconds
