"""A step's timeline, as reports want it: for predictions and for what was measured."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from stowplan.reports.pipeline import Floats, Integers, Lane, PipelineReport

if TYPE_CHECKING:
    from stowplan.core.schedule import Schedule
    from stowplan.planner.schedule import Timeline

__all__ = ["lane_of", "report_of"]


def report_of(
    name: str,
    timeline: Timeline,
    *,
    in_bytes: bool,
    limit_microbatches: int | None = None,
    limit_bytes: int | None = None,
    bound_seconds: float | None = None,
    named_seconds: dict[str, float] | None = None,
) -> PipelineReport:
    """What ``timeline`` says, under ``name``. ``in_bytes``: levels are bytes, not counted activations."""
    schedule = timeline.schedule
    lanes = [
        lane_of(schedule, device, begins, ends, memory.times, memory.levels)
        for device, (begins, ends, memory) in enumerate(
            zip(timeline.begins, timeline.ends, timeline.memory, strict=True)
        )
    ]
    limit = limit_bytes
    if limit_microbatches is not None:
        limit = max(map(partial(_bytes_of, timeline, limit_microbatches), range(schedule.num_devices)))
    return PipelineReport(
        name=name,
        num_microbatches=schedule.num_microbatches,
        lanes=lanes,
        step_time=timeline.step_seconds,
        work_time=max(timeline.work_seconds),
        in_bytes=in_bytes,
        per_microbatch=sum(timeline.costs.stages[stage].forward_bytes for stage in schedule.stages_of(0)),
        limit=limit,
        bound_time=bound_seconds,
        named=named_seconds or {},
    )


def lane_of(schedule: Schedule, device: int, begins: Floats, ends: Floats, times: Floats, levels: Integers) -> Lane:
    """What ``device`` does when, and what it holds."""
    order, stages = schedule.orders[device], schedule.stages_of(device)
    return Lane(
        begins=begins,
        ends=ends,
        kinds="".join(action.kind for action in order),
        chunks=np.array([stages.index(action.stage) for action in order], dtype=np.int64),
        times=times,
        levels=levels,
    )


def _bytes_of(timeline: Timeline, num_microbatches: int, device: int) -> int:
    """What a device holds with so many microbatches: bytes, or activations where each counts as one."""
    stages = [timeline.costs.stages[stage] for stage in timeline.schedule.stages_of(device)]
    return sum(stage.static_bytes + num_microbatches * stage.forward_bytes for stage in stages)
