"""How often snapshots are taken."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan import InvalidArgument
from stowplan.runtime.snapshot.interval import Timetable, interval_seconds, interval_steps

times = st.floats(1e-3, 1e5)


@given(times, times, st.floats(0.1, 10))
def test_youngs_interval_loses_the_least_time(cost: float, mtbf: float, factor: float) -> None:
    def lost(interval: float) -> float:  # stops of snapshots, and half an interval at each failure, by second
        return cost / interval + interval / 2 / mtbf

    best = interval_seconds(cost, mtbf)
    assert lost(best) <= lost(best * factor) * (1 + 1e-9)


@given(times, times, times, times)
def test_steps_are_no_shorter_than_a_snapshot_takes(cost: float, mtbf: float, step: float, least: float) -> None:
    steps = interval_steps(cost, mtbf, step_seconds=step, least_seconds=least)
    assert steps is not None
    assert steps >= 1
    assert steps * step >= least * (1 - 1e-9)
    assert steps * step >= interval_seconds(cost, mtbf) * (1 - 1e-9)
    assert steps == 1 or (steps - 1) * step < max(least, math.sqrt(2 * cost * mtbf))


def test_nothing_fails_so_nothing_is_taken() -> None:
    assert interval_steps(1, math.inf, step_seconds=1) is None


def test_free_snapshots_are_taken_as_fast_as_they_go() -> None:
    assert interval_steps(0, 100, step_seconds=1) == 1
    assert interval_steps(0, 100, step_seconds=1, least_seconds=3.5) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cost_seconds": -1}, "cost_seconds=-1"),
        ({"cost_seconds": math.nan}, "cost_seconds=nan"),
        ({"mtbf_seconds": 0}, "mtbf_seconds=0"),
        ({"mtbf_seconds": math.nan}, "mtbf_seconds=nan"),
        ({"step_seconds": 0}, "step_seconds=0"),
        ({"least_seconds": math.inf}, "least_seconds=inf"),
    ],
)
def test_what_is_no_time_is_refused(arguments: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        interval_steps(**{"cost_seconds": 1, "mtbf_seconds": 1, "step_seconds": 1, **arguments})


def test_without_anything_each_step_is_due_and_with_an_interval_its_multiples() -> None:
    assert all(map(Timetable().due, range(1, 5)))
    assert [step for step in range(1, 10) if Timetable(3).due(step)] == [3, 6, 9]


def test_youngs_rule_takes_over_when_all_is_measured() -> None:
    table = Timetable(mtbf_seconds=50)
    for step in (1, 2):
        assert table.due(step)
        table.plan(step, None if step == 1 else 1.0, None, 1.0)
    assert table.interval == 10  # the root of 2 · 1 s · 50 s
    assert next(step for step in range(3, 30) if table.due(step)) == 12
    table.plan(14, 1.0, 20.5, 1.0)
    assert (table.interval, table.due(34), table.due(35)) == (21, False, True)


def test_where_nothing_fails_none_is_due_once_that_is_clear() -> None:
    table = Timetable(mtbf_seconds=math.inf)
    assert table.due(1)
    table.plan(1, 1.0, 1.0, 1.0)
    assert table.interval is None
    assert not table.due(1 << 40)


def test_steps_are_timed_without_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    table = Timetable()
    for step in range(1, 4):
        now[0] += 2.0
        table.pause(step)
        now[0] += 100.0
        table.resume(step)
    assert table.step_seconds == 2.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0,), "interval=0: give a whole number"),
        ((1.5,), r"interval=1\.5"),
        ((None, 0), "mtbf_seconds=0"),
        ((5, 100.0), "both given"),
    ],
)
def test_a_timetable_of_nonsense_is_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Timetable(*arguments)
