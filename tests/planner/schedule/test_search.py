"""The search: never worse than what has a name, within its limit, and as good as it was found to be."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowplan.core.errors import InfeasibleSchedule, InvalidArgument
from stowplan.core.schedule import Schedule
from stowplan.planner.schedule import (
    NAMES,
    Costs,
    Found,
    StageCosts,
    activation_peaks,
    check,
    check_bytes,
    generate,
    search,
    simulate,
    stages_per_device,
)
from stowplan.planner.schedule.bounds import published_bound_seconds, step_bound_seconds
from tests.planner.schedule.random_costs import costs_of, schedules

LITTLE = 20_000  # steps


def microbatches(found: Found, num_devices: int) -> float:
    return max(activation_peaks(found.schedule)) / (found.schedule.num_stages // num_devices)


def timeline_of(name: str, costs: Costs, num_devices: int, num_microbatches: int):
    merged = costs if stages_per_device(name) == 2 else costs.merged(2)
    return simulate(generate(name, num_devices, num_microbatches), merged)


def costs_for_search(num_devices: int) -> st.SearchStrategy[Costs]:
    return costs_of(2 * num_devices)


@settings(max_examples=30)
@given(st.data(), st.integers(1, 4), st.integers(1, 8), st.integers(1, 5))
def test_within_microbatches_nothing_named_is_faster(data: st.DataObject, p: int, m: int, limit: int) -> None:
    costs = data.draw(costs_for_search(p))
    found = search(costs, p, m, limit_microbatches=limit, steps=LITTLE)
    check(found.schedule, limit_microbatches=limit)
    assert microbatches(found, p) <= limit
    assert found.bound_seconds <= found.timeline.step_seconds * (1 + 1e-9)
    for name in NAMES:
        if name == "interleaved" and m % p:
            continue
        timeline = timeline_of(name, costs, p, m)
        fits = max(activation_peaks(timeline.schedule)) <= limit * stages_per_device(name)
        assert (name in found.named_seconds) == fits
        if fits:
            assert found.timeline.step_seconds <= timeline.step_seconds


@settings(max_examples=30)
@given(st.data(), st.integers(1, 4), st.integers(1, 8), st.floats(0, 1))
def test_within_bytes_all_is_counted(data: st.DataObject, p: int, m: int, share: float) -> None:
    """From the least limit to what gpipe takes: what is found stays within, and what is below the least is refused."""
    costs = data.draw(costs_for_search(p))
    costs = replace(costs, stages=tuple(replace(s, static_bytes=s.static_bytes + 1) for s in costs.stages))
    with pytest.raises(InfeasibleSchedule) as caught:
        search(costs, p, m, limit_bytes=1)
    least = caught.value.least_bytes
    most = max(least, *timeline_of("gpipe", costs, p, m).peaks_bytes)
    limit = least + round(share * (most - least))
    found = search(costs, p, m, limit_bytes=limit, steps=LITTLE)
    check(found.schedule)
    assert max(found.timeline.peaks_bytes) <= limit
    check_bytes(found.schedule, found.timeline.costs, limit)
    assert found.bound_seconds <= found.timeline.step_seconds * (1 + 1e-9)
    with pytest.raises(InfeasibleSchedule):
        search(costs, p, m, limit_bytes=least - 1)


@settings(max_examples=50)
@given(st.data(), schedules(), st.booleans())
def test_no_schedule_beats_the_bound_of_its_own_peak(data: st.DataObject, schedule: Schedule, by_bytes: bool) -> None:
    p, m = schedule.num_devices, schedule.num_microbatches
    if schedule.num_stages not in (p, 2 * p):
        return
    costs = data.draw(costs_of(2 * p))
    timeline = simulate(schedule, costs if schedule.num_stages == 2 * p else costs.merged(2))
    per_device = schedule.num_stages // p
    if by_bytes:
        bound = step_bound_seconds(costs, p, m, limit_bytes=max(1, *timeline.peaks_bytes))
    else:
        bound = step_bound_seconds(costs, p, m, limit_microbatches=-(-max(activation_peaks(schedule)) // per_device))
    assert timeline.step_seconds >= bound * (1 - 1e-9)


def test_the_published_bound_is_for_equal_times_and_many_microbatches() -> None:
    assert published_bound_seconds(Costs.uniform(8), 4, 8, 3) == 6 * 8 + 5
    assert published_bound_seconds(Costs.uniform(8), 4, 8, 4) == 6 * 8 + 3
    assert published_bound_seconds(Costs.uniform(8), 4, 7, 3) == 0
    assert published_bound_seconds(Costs.uniform(8, (1, 2, 1)), 4, 8, 3) == 0
    assert published_bound_seconds(Costs.uniform(8), 4, 8, None) == 0


def test_the_same_seed_finds_the_same() -> None:
    costs = Costs.uniform(8, (10, 13, 8), communication_seconds=1)
    first, second = (search(costs, 4, 12, limit_microbatches=3, steps=LITTLE, seed=5) for _ in range(2))
    assert first.schedule == second.schedule


def test_what_is_handed_in_is_never_lost() -> None:
    costs = Costs.uniform(8, (10, 13, 8))
    best = search(costs, 4, 12, limit_microbatches=2, steps=200_000)
    again = search(costs, 4, 12, limit_microbatches=3, starts=[best.schedule], steps=1)
    assert again.timeline.step_seconds <= best.timeline.step_seconds


def test_without_a_limit_there_is_one_bubble_only() -> None:
    found = search(Costs.uniform(8), 4, 12)
    assert found.timeline.bubble_seconds == 3
    assert found.gap == 0


def bubble(p: int, limit: int, steps: int, costs: Costs | None = None, starts: tuple[Schedule, ...] = ()) -> Found:
    costs = Costs.uniform(2 * p) if costs is None else costs
    return search(costs, p, 3 * p, limit_microbatches=limit, steps=steps, starts=starts, time_limit_seconds=3600)


@pytest.mark.parametrize(("limit", "ticks"), [(2, 11), (3, 5), (4, 3)])
def test_four_devices_attain_the_bound(limit: int, ticks: int) -> None:
    found = bubble(4, limit, LITTLE)
    assert found.timeline.bubble_seconds == ticks == max(3, 6 * 4 - 1 - 6 * limit)
    assert found.gap == 0


# Bubbles in ticks of a search that was made before this one, as upper limits; attained bounds are told by the formula.
@pytest.mark.slow
@pytest.mark.parametrize(("limit", "at_most"), [(4, 23), (5, 17), (6, 11), (7, 9), (8, 7)])
def test_eight_devices(limit: int, at_most: int) -> None:
    assert bubble(8, limit, 300_000).timeline.bubble_seconds <= at_most


@pytest.mark.full
@pytest.mark.parametrize(("limit", "at_most"), [(6, 59), (8, 58), (9, 44), (12, 37), (16, 15)])
def test_sixteen_devices(limit: int, at_most: int) -> None:
    assert bubble(16, limit, 1_000_000).timeline.bubble_seconds <= at_most


@pytest.mark.full
@pytest.mark.parametrize(("limit", "at_most"), [(4, 675), (5, 309), (6, 271), (7, 225)])
def test_eight_devices_with_other_times(limit: int, at_most: int) -> None:
    costs = Costs.uniform(16, (10, 13, 8), communication_seconds=1)
    assert bubble(8, limit, 4_000_000, costs).timeline.bubble_seconds <= at_most


def test_a_heavy_head_takes_from_the_first_device_only() -> None:
    """Static bytes of the last stage are the first device's in a V, the last one's in a line."""
    stages = [StageCosts(forward_bytes=10, static_bytes=100)] * 8
    stages[-1] = replace(stages[-1], static_bytes=150)
    found = search(Costs(tuple(stages)), 4, 12, limit_bytes=290, steps=LITTLE)
    assert max(found.timeline.peaks_bytes) <= 290
    assert found.schedule.stage_devices == (0, 1, 2, 3, 3, 2, 1, 0)


def test_a_limit_below_the_least_names_it() -> None:
    costs = Costs((StageCosts(forward_bytes=10, static_bytes=5),) * 4)
    with pytest.raises(InfeasibleSchedule, match=r"the least limit is 30 B \(30 bytes\)") as caught:
        search(costs, 2, 4, limit_bytes=29)
    assert (caught.value.limit_bytes, caught.value.least_bytes) == (29, 30)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert max(search(costs, 2, 4, limit_bytes=30).timeline.peaks_bytes) == 30


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_devices": 0}, "num_devices=0"),
        ({"num_microbatches": 1.5}, r"num_microbatches=1\.5"),
        ({"limit_microbatches": 0}, "limit_microbatches=0"),
        ({"limit_bytes": -4}, "limit_bytes=-4"),
        ({"limit_bytes": 4, "limit_microbatches": 4}, "are both given"),
        ({"num_devices": 3}, "costs have 4 stages: give 6, two for each of 3 devices"),
    ],
)
def test_what_cannot_be_searched_is_refused(changed: dict[str, float], said: str) -> None:
    given_arguments = {"num_devices": 2, "num_microbatches": 4, **changed}
    with pytest.raises(InvalidArgument, match=said):
        search(Costs.uniform(4), **given_arguments)  # type: ignore[arg-type]
