"""The simulator agrees with a plain one, and with arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan.core.errors import InvalidArgument, InvalidSchedule
from stowplan.core.schedule import Schedule
from stowplan.planner.schedule import Costs, StageCosts, generate, simulate
from tests.planner.schedule import slow
from tests.planner.schedule.random_costs import costs_of, schedules


@given(st.data(), schedules(most_devices=4, most_microbatches=5))
def test_times_and_bytes_are_those_of_a_plain_simulator(data: st.DataObject, schedule: Schedule) -> None:
    costs = data.draw(costs_of(schedule.num_stages))
    timeline = simulate(schedule, costs)
    ends = slow.ends(schedule, costs)
    for order, begin, end in zip(schedule.orders, timeline.begins, timeline.ends, strict=True):
        assert end.tolist() == [ends[action] for action in order]
        assert begin.tolist() == [ends[action] - slow.seconds(costs, action) for action in order]
    assert timeline.step_seconds == max(ends.values())
    assert timeline.peaks_bytes == [slow.peak_bytes(schedule, costs, d) for d in range(schedule.num_devices)]


@given(st.data(), schedules())
def test_bytes_end_where_they_began(data: st.DataObject, schedule: Schedule) -> None:
    costs = data.draw(costs_of(schedule.num_stages))
    for device, memory in enumerate(simulate(schedule, costs).memory):
        static = sum(costs.stages[stage].static_bytes for stage in schedule.stages_of(device))
        assert memory.levels[-1] == static
        assert (np.diff(memory.times) > 0).all()


def test_bubbles_are_what_is_left_of_the_step() -> None:
    costs = Costs(tuple(StageCosts(forward_seconds=seconds) for seconds in (1.0, 4.0)))
    timeline = simulate(Schedule.from_text("0: 0F0 0B0\n1: 1F0 1B0\n"), costs)
    assert timeline.step_seconds == 1 + 4 + 2 + 2
    assert timeline.work_seconds == [3.0, 6.0]
    assert timeline.idle_seconds == [6.0, 3.0]
    assert (timeline.bubble_seconds, timeline.bubble_rate) == (3.0, 3 / 9)


def test_communication_is_paid_between_devices_only() -> None:
    text = "0: 0F0 3F0 3B0 0B0\n1: 1F0 2F0 2B0 1B0\n"
    costs = Costs.uniform(4, communication_seconds=0.5)
    assert simulate(Schedule.from_text(text), costs).step_seconds == 4 * 3 + 4 * 0.5


def test_buffers_of_all_microbatches_are_there_all_the_time_where_asked() -> None:
    schedule = generate("1f1b", 2, 5)
    stages = (StageCosts(forward_bytes=0, input_bytes=7),) * 2
    for ahead, peak in ((True, 5 * 7), (False, 7)):
        assert simulate(schedule, Costs(stages, 0.0, ahead)).peaks_bytes[0] == peak


def test_what_never_ends_and_what_does_not_match_is_refused() -> None:
    with pytest.raises(InvalidSchedule, match="never ends"):
        simulate(Schedule.from_text("0: 0B0 0F0\n1: 1F0 1B0\n"), Costs.uniform(2))
    with pytest.raises(InvalidArgument, match="costs have 3 stages, the schedule has 2"):
        simulate(Schedule.from_text("0: 0F0 0B0\n1: 1F0 1B0\n"), Costs.uniform(3))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"forward_seconds": 0.0}, "forward_seconds=0.0 is no time"),
        ({"weight_gradient_seconds": math.nan}, "weight_gradient_seconds=nan is no time"),
        ({"static_bytes": -1}, "has negative bytes"),
        ({"forward_bytes": 3, "input_gradient_bytes": -4}, "frees more than the forward_bytes=3"),
    ],
)
def test_costs_that_cannot_be_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        StageCosts(**wrong)  # type: ignore[arg-type]


def test_pipelines_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="has no stage"):
        Costs(())
    with pytest.raises(InvalidArgument, match=r"communication_seconds=-1\.0 is no time"):
        Costs.uniform(2, communication_seconds=-1.0)
    with pytest.raises(InvalidArgument, match="3 stages cannot be merged by 2"):
        Costs.uniform(3).merged(2)


def test_merged_stages_do_what_both_did() -> None:
    first = StageCosts(forward_seconds=2, forward_bytes=5, transient_bytes=(1, 8, 0), input_bytes=3, static_bytes=10)
    second = StageCosts(forward_seconds=3, forward_bytes=7, transient_bytes=(4, 2, 6), input_bytes=9, static_bytes=20)
    assert Costs((first, second), 0.5, True).merged(2) == Costs(
        (
            StageCosts(
                forward_seconds=5,
                input_gradient_seconds=2,
                weight_gradient_seconds=2,
                forward_bytes=12,
                transient_bytes=(4, 8, 6),
                input_bytes=3,
                static_bytes=30,
            ),
        ),
        0.5,
        True,
    )
