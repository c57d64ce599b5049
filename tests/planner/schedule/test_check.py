"""What cannot be run is found, and shown."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stowplan.core.errors import InvalidSchedule
from stowplan.core.schedule import Action, Kind, Schedule
from stowplan.planner.schedule import Costs, StageCosts, check, check_bytes, generate, order_peaks_bytes, simulate
from tests.planner.schedule.random_costs import costs_of, schedules

F, I, W, B = Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.BACKWARD  # noqa: E741


def with_order(schedule: Schedule, device: int, order: list[Action]) -> Schedule:
    orders = list(schedule.orders)
    orders[device] = tuple(order)
    return dataclasses.replace(schedule, orders=tuple(orders))


def needs(later: Action, earlier: Action) -> bool:
    """Whether ``later`` cannot be computed before ``earlier``, wherever they are computed: for every order it is wrong
    to have them the other way round, as nothing else can bring about what ``later`` waits for."""
    if later.microbatch != earlier.microbatch or later == earlier:
        return False
    if earlier.kind is F:
        return later.kind is not F or later.stage > earlier.stage
    if earlier.kind in (I, B):
        if later.kind is W:
            return earlier.kind is I and later.stage <= earlier.stage
        return later.kind in (I, B) and later.stage < earlier.stage
    return False  # nothing waits for W


CORRUPTIONS = ("dropped", "doubled", "swapped", "moved", "other kind")


@given(st.data(), schedules(), st.sampled_from(CORRUPTIONS))
def test_one_wrong_action_is_always_caught(data: st.DataObject, schedule: Schedule, corruption: str) -> None:
    """Every corruption here is wrong by what a schedule is: each pass once, on its device, after what it needs.

    Swapping two actions of which neither needs the other may leave a schedule that runs, so only those are swapped
    of which one needs the other. All else is wrong however the rest looks, as one pass is then missing or extra.
    """
    device = data.draw(st.integers(0, schedule.num_devices - 1))
    order = list(schedule.orders[device])
    place = data.draw(st.integers(0, len(order) - 1))
    if corruption == "dropped":
        broken = with_order(schedule, device, order[:place] + order[place + 1 :])
    elif corruption == "doubled":
        other = data.draw(st.integers(0, len(order)))
        broken = with_order(schedule, device, [*order[:other], order[place], *order[other:]])
    elif corruption == "swapped":
        later = [k for k in range(place + 1, len(order)) if needs(order[k], order[place])]
        assume(later)
        other = data.draw(st.sampled_from(later))
        order[place], order[other] = order[other], order[place]
        broken = with_order(schedule, device, order)
    elif corruption == "moved":
        assume(schedule.num_devices > 1)
        target = data.draw(st.integers(0, schedule.num_devices - 1).filter(lambda number: number != device))
        there = list(schedule.orders[target])
        there.insert(data.draw(st.integers(0, len(there))), order[place])
        broken = with_order(with_order(schedule, target, there), device, order[:place] + order[place + 1 :])
    else:
        kind = data.draw(st.sampled_from([kind for kind in Kind if kind is not order[place].kind]))
        order[place] = order[place]._replace(kind=kind)
        broken = with_order(schedule, device, order)
    with pytest.raises(InvalidSchedule) as caught:
        check(broken)
    error = caught.value
    assert error.device is not None
    assert error.position is not None
    marked = broken.orders[error.device][error.position : error.position + 1]
    assert f">{marked[0] if marked else 'end'}<" in error.grid


def told(text: str, **more: object) -> str:
    with pytest.raises(InvalidSchedule) as caught:
        check(Schedule.from_text(text), **more)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_deadlock_names_who_waits_for_whom() -> None:
    message = told("0: 0F0 0B0 0F1 0B1\n1: 1F0 1F1 1B0 1B1\n")
    assert message.splitlines() == [
        "deadlock: device 0 waits in 0B0 for 1I (or B) of microbatch 0 from device 1; device 1 waits in 1F1 for 0F of "
        "microbatch 1 from device 0 (device 0, position 1)",
        "0:   0F0 >0B0<   0F1   0B1",
        "1:   1F0   1F1   1B0   1B1",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0: 0F0 0B0 0F0\n", "0F0 is there twice"),
        ("0: 0F0 0I0\n", "stage 0 never does W of microbatch 0"),
        ("0: 0F0 0F1 0B0\n", r"stage 0 never does B \(or I and W\) of microbatch 1"),
        ("0: 0B0 0F0\n", "0B0 comes before 0F0"),
        ("0: 0F0 0W0 0I0\n", "0W0 comes before 0I0"),
        ("0: 0F0 0I0 0B0 0W0\n", "0B0 computes the input's gradient a second time"),
        ("0: 0F0 0B0 0W0\n", "0W0 comes after the backward pass of this microbatch is over"),
        ("0: 0F0 0B0\n1: 1F0 1B0 0F1\n", "0F1 is of a stage that device 0 holds"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(InvalidSchedule, match=said):
        check(Schedule.from_text(text))


def test_made_up_schedules_are_looked_through_too() -> None:
    action = Action(0, F, 0)
    with pytest.raises(InvalidSchedule, match="device 1 holds no stage"):
        check(Schedule(((action, Action(0, B, 0)), ()), (0,), 1))
    with pytest.raises(InvalidSchedule, match="has more devices than there are orders"):
        check(Schedule(((action,),), (0, 1), 1))
    with pytest.raises(InvalidSchedule, match="3F0 is not of this pipeline, which has stages 0 to 0"):
        check(Schedule(((Action(3, F, 0),),), (0,), 1))


def test_a_peak_above_the_limit_is_shown_where_it_is() -> None:
    schedule = generate("v-half", 4, 12)
    check(schedule, limit_microbatches=3)
    with pytest.raises(InvalidSchedule, match="holds 6 activations here, more than the 4 of 2 microbatches") as caught:
        check(schedule, limit_microbatches=2)
    held = [action.kind is F for action in schedule.orders[caught.value.device][: caught.value.position + 1]]
    assert held[-1]


def test_bytes_above_the_limit_are_shown() -> None:
    schedule = generate("1f1b", 3, 4)
    costs = Costs((StageCosts(forward_bytes=10, transient_bytes=(3, 5, 7), static_bytes=100),) * 3)
    assert order_peaks_bytes(schedule, costs) == [100 + 30 + 7, 100 + 20 + 7, 100 + 10 + 7]
    check_bytes(schedule, costs, 137)
    with pytest.raises(InvalidSchedule, match=r"137 B are needed here, more than the limit of 136 B \(device 0"):
        check_bytes(schedule, costs, 136)


@given(st.data(), schedules())
def test_peaks_by_order_are_those_over_time_without_buffers(data: st.DataObject, schedule: Schedule) -> None:
    costs = data.draw(costs_of(schedule.num_stages))
    stages = tuple(dataclasses.replace(stage, input_bytes=0) for stage in costs.stages)
    costs = dataclasses.replace(costs, stages=stages)
    assert simulate(schedule, costs).peaks_bytes == order_peaks_bytes(schedule, costs)


def test_the_error_travels_between_processes() -> None:
    with pytest.raises(InvalidSchedule) as caught:
        check(Schedule.from_text("0: 0F0 0I0\n"))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.device, again.position) == (str(caught.value), 0, 2)
