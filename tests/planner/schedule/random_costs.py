"""Strategies: pipelines, schedules for them, and what their stages cost."""

from __future__ import annotations

from hypothesis import strategies as st

from stowplan.core.schedule import Schedule
from stowplan.planner.schedule import NAMES, Costs, StageCosts, generate

BYTES = st.integers(0, 40)
SECONDS = st.integers(1, 9).map(float)


@st.composite
def stage_costs(draw: st.DrawFn) -> StageCosts:
    forward_bytes = draw(BYTES)
    return StageCosts(
        forward_seconds=draw(SECONDS),
        input_gradient_seconds=draw(SECONDS),
        weight_gradient_seconds=draw(SECONDS),
        forward_bytes=forward_bytes,
        input_gradient_bytes=draw(st.integers(-forward_bytes, 40)),
        transient_bytes=draw(st.tuples(BYTES, BYTES, BYTES)),
        input_bytes=draw(BYTES),
        static_bytes=draw(BYTES),
    )


@st.composite
def costs_of(draw: st.DrawFn, num_stages: int) -> Costs:
    stages = draw(st.lists(stage_costs(), min_size=num_stages, max_size=num_stages))
    return Costs(tuple(stages), draw(st.integers(0, 5)) * 0.5, draw(st.booleans()))


@st.composite
def schedules(draw: st.DrawFn, most_devices: int = 6, most_microbatches: int = 9) -> Schedule:
    name = draw(st.sampled_from(NAMES))
    num_devices = draw(st.integers(1, most_devices))
    num_microbatches = draw(st.integers(1, most_microbatches))
    if name == "interleaved":
        num_microbatches = num_devices * (1 + num_microbatches // num_devices)
        return generate(name, num_devices, num_microbatches, num_chunks=draw(st.integers(1, 3)))
    return generate(name, num_devices, num_microbatches)
