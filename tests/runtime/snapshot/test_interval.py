"""How often snapshots are taken."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan import InvalidArgument
from stowplan.runtime.snapshot.interval import interval_seconds, interval_steps

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


def test_what_the_user_chose_is_taken() -> None:
    assert interval_steps(1, 100, step_seconds=1, chosen=7) == 7
    assert interval_steps(1, math.inf, step_seconds=1, chosen=7) == 7


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
        ({"chosen": 0}, "every 0 steps"),
        ({"chosen": 1.5}, r"every 1\.5 steps"),
    ],
)
def test_what_is_no_time_is_refused(arguments: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        interval_steps(**{"cost_seconds": 1, "mtbf_seconds": 1, "step_seconds": 1, **arguments})
