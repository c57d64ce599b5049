"""A step's timeline, as reports want it: for predictions and for what was measured."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from stowplan.reports.pipeline import Lane, PipelineReport

if TYPE_CHECKING:
    from stowplan.planner.schedule import Timeline

__all__ = ["report_of"]


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
    lanes = []
    for device, order in enumerate(schedule.orders):
        stages = schedule.stages_of(device)
        lanes.append(
            Lane(
                begins=timeline.begins[device],
                ends=timeline.ends[device],
                kinds="".join(action.kind for action in order),
                chunks=np.array([stages.index(action.stage) for action in order], dtype=np.int64),
                times=timeline.memory[device].times,
                levels=timeline.memory[device].levels,
            )
        )
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


def _bytes_of(timeline: Timeline, num_microbatches: int, device: int) -> int:
    """What a device holds with so many microbatches: bytes, or activations where each counts as one."""
    stages = [timeline.costs.stages[stage] for stage in timeline.schedule.stages_of(device)]
    return sum(stage.static_bytes + num_microbatches * stage.forward_bytes for stage in stages)
