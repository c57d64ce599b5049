"""What the devices of a pipeline may hold."""

from __future__ import annotations

import math
from dataclasses import replace

from stowplan.core.schedule import Schedule
from stowplan.planner.schedule.check import activation_peaks
from stowplan.planner.schedule.costs import Costs
from stowplan.planner.schedule.engine import Pipeline
from stowplan.planner.schedule.simulate import Timeline, simulate

__all__ = ["Limit"]


class Limit:
    """What a device may hold, and what that means for each kind of placement."""

    def __init__(self, costs: Costs, num_devices: int, microbatches: int | None, limit_bytes: int | None) -> None:
        self.costs, self.num_devices = costs, num_devices
        self.microbatches, self.limit_bytes = microbatches, limit_bytes

    @property
    def has_buffers(self) -> bool:
        """Whether tensors on their way count against the limit."""
        return self.limit_bytes is not None and any(stage.input_bytes for stage in self.costs.stages)

    def bytes_over(self, timeline: Timeline) -> int:
        """By how much the highest peak is above the limit in bytes."""
        assert self.limit_bytes is not None
        return max(timeline.peaks_bytes) - self.limit_bytes

    def timeline(self, schedule: Schedule) -> Timeline:
        """``schedule`` simulated; stages of one a device cost what two neighbours do."""
        costs = self.costs
        return simulate(schedule, costs if schedule.num_stages == len(costs.stages) else costs.merged(2))

    def holds(self, timeline: Timeline) -> bool:
        """Whether every device stays within the limit."""
        if self.microbatches is not None:
            per_device = timeline.schedule.num_stages // self.num_devices
            return max(activation_peaks(timeline.schedule)) <= self.microbatches * per_device
        return self.limit_bytes is None or self.bytes_over(timeline) <= 0

    def pipeline(self, num_microbatches: int, margin_bytes: int) -> Pipeline:
        """What the engine may use: the limit less what is there all the time, and less ``margin_bytes``."""
        p, stages = self.num_devices, self.costs.stages
        if self.microbatches is not None:
            return Pipeline(_counted(self.costs), num_microbatches, [2.0 * self.microbatches] * p)
        if self.limit_bytes is None:
            return Pipeline(self.costs, num_microbatches, [math.inf] * p)
        static = [stages[i].static_bytes + stages[2 * p - 1 - i].static_bytes for i in range(p)]
        return Pipeline(self.costs, num_microbatches, [float(self.limit_bytes - margin_bytes - s) for s in static])

    def room_microbatches(self, num_microbatches: int) -> list[float]:
        """About how many microbatches the tightest and the roomiest device may hold."""
        if self.microbatches is not None:
            return [float(self.microbatches)]
        if self.limit_bytes is None:
            return [float(num_microbatches)]
        p, stages = self.num_devices, self.costs.stages
        rooms = []
        for first, second in ((stages[i], stages[2 * p - 1 - i]) for i in range(p)):
            held = max(1, first.forward_bytes + second.forward_bytes)
            rooms.append((self.limit_bytes - first.static_bytes - second.static_bytes) / held)
        return sorted({max(1.0, min(rooms)), max(1.0, *rooms)})


def _counted(costs: Costs) -> Costs:
    """The same times, and an activation of each stage counts as 1."""
    return Costs(
        tuple(
            replace(stage, forward_bytes=1, input_gradient_bytes=0, transient_bytes=(0, 0, 0), input_bytes=0)
            for stage in costs.stages
        ),
        costs.communication_seconds,
    )
