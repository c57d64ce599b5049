"""Schedules and menus of activation plans, chosen together."""

from __future__ import annotations

from itertools import product

import pytest

from stowplan.core.errors import InfeasibleSchedule
from stowplan.core.schedule import Kind, loop_placement, v_placement
from stowplan.planner.schedule import Costs, StageCosts, check, generate, search, simulate
from stowplan.planner.schedule.joint import choose

P, M = 4, 12


def menu(scale: float = 1.0) -> list[StageCosts]:
    """Everything kept, two ways between, everything recomputed."""
    ways = ((100, 0.0), (60, 0.1), (30, 0.25), (8, 0.33))
    return [
        StageCosts(
            forward_seconds=scale,
            input_gradient_seconds=scale + slower,
            forward_bytes=held,
            input_bytes=4,
            transient_bytes=(10, 20, 5),
            static_bytes=500,
        )
        for held, slower in ways
    ]


def test_where_there_is_room_everything_is_kept() -> None:
    choice = choose([menu()] * (2 * P), v_placement(P), M, 10**6, steps=20_000)
    assert choice.levels == (0,) * (2 * P)
    assert [trial.levels for trial in choice.trials] == [(0, 0)]  # nothing else can be faster
    best = search(Costs((menu()[0],) * (2 * P)), P, M, steps=20_000, v_only=True)
    assert choice.timeline.step_seconds == best.timeline.step_seconds


@pytest.mark.parametrize("limit_bytes", [1700, 1500, 1300, 1200, 1100])
def test_holding_less_is_chosen_where_it_makes_the_step_shorter(limit_bytes: int) -> None:
    menus = [menu()] * (2 * P)
    choice = choose(menus, v_placement(P), M, limit_bytes, steps=20_000)
    check(choice.schedule)
    costs = Costs(tuple(menus[stage][level] for stage, level in enumerate(choice.levels)))
    timeline = simulate(choice.schedule, costs)
    assert max(timeline.peaks_bytes) <= limit_bytes
    assert timeline.step_seconds == choice.timeline.step_seconds
    for level in range(4):  # one level for all, by the same search alone
        try:
            alone = search(Costs((menu()[level],) * (2 * P)), P, M, limit_bytes=limit_bytes, steps=20_000, v_only=True)
        except InfeasibleSchedule:
            continue
        assert choice.timeline.step_seconds <= alone.timeline.step_seconds * 1.02  # which starts from nothing


def test_both_halves_of_the_model_may_be_on_different_levels() -> None:
    choice = choose([menu()] * (2 * P), v_placement(P), M, 1300, steps=50_000)
    assert len(set(choice.levels)) > 1
    together = min(t.step_seconds for t in choice.trials if t.origin and t.levels[0] == t.levels[1])
    assert choice.timeline.step_seconds < together


def test_the_least_limit_is_named_and_is_enough() -> None:
    menus = [menu()] * (2 * P)
    with pytest.raises(InfeasibleSchedule) as caught:
        choose(menus, v_placement(P), M, 900, steps=20_000)
    assert choose(menus, v_placement(P), M, caught.value.least_bytes, steps=20_000).levels == (3,) * (2 * P)
    assert caught.value.least_bytes < 2 * (500 + 100)


def test_stages_with_one_way_only_keep_it() -> None:
    menus = [menu(), menu()[:1], *[menu()] * 6]
    choice = choose(menus, v_placement(P), M, 1250, steps=20_000)
    assert choice.levels[1] == 0


@pytest.mark.parametrize(("name", "placement"), [("1f1b", loop_placement(P)), ("interleaved", loop_placement(P, 2))])
def test_other_placements_choose_among_schedules_with_a_name(name: str, placement: tuple[int, ...]) -> None:
    menus = [menu()] * len(placement)
    roomy = choose(menus, placement, M, 10**6, splits_backward=False)
    assert roomy.schedule.stage_devices == placement
    named = simulate(generate(name, P, M), Costs((menu()[0],) * len(placement)))
    assert roomy.timeline.step_seconds <= named.step_seconds
    tight = max(named.peaks_bytes) - 150
    choice = choose(menus, placement, M, tight, splits_backward=False)
    assert not choice.schedule.splits_backward
    assert max(choice.timeline.peaks_bytes) <= tight


@pytest.mark.parametrize(("p", "k", "seconds"), list(product((2, 4), (1, 2, 3), ((1, 1, 1), (10, 13, 8)))))
def test_found_schedules_have_each_stage_s_passes_in_the_order_of_microbatches(
    p: int, k: int, seconds: tuple[float, float, float]
) -> None:
    found = search(Costs.uniform(2 * p, seconds), p, 3 * p, limit_microbatches=k, steps=50_000)
    for order in found.schedule.orders:
        for stage, kind in {action[:2] for action in order}:
            numbers = [action.microbatch for action in order if (action.stage, action.kind) == (stage, kind)]
            assert numbers == sorted(numbers)
            assert kind in Kind
