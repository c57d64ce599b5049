from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings

from stowplan.core.plan import Measurement, Plan
from stowplan.core.program import Action
from stowplan.reports.figures import bytes_by_action, bytes_by_category, compare, peak_moment
from tests.arbitrary_plans import plans
from tests.plans import LAYER, example_plan, measured_plan


@given(plans())
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], max_examples=30)
def test_categories_add_up_to_the_peak_of_every_moment(plan: Plan) -> None:
    for moment in plan.prediction.moments:
        parts = bytes_by_category(moment, plan.step)
        assert sum(parts) == moment.peak_bytes
        assert min(parts) >= 0


def test_gradients_held_all_step_are_gradients() -> None:
    plan = example_plan()
    held = replace(plan.step, held_gradient_bytes=1000)
    moment = replace(plan.prediction.moments[0], static_bytes=held.static_bytes)
    assert bytes_by_category(moment, held)[2] == 1000


def test_the_peak_moment_is_the_one_predicted() -> None:
    plan = example_plan()
    moment = peak_moment(plan)
    assert moment is not None
    assert (moment.name, moment.peak_bytes) == (plan.prediction.peak_moment, plan.prediction.peak_bytes)


def test_bytes_by_action_are_those_of_the_prediction() -> None:
    plan = example_plan()
    totals = bytes_by_action(plan)
    assert totals[Action.SWAP] == plan.prediction.swapped_bytes
    assert totals[Action.RECOMPUTE] == plan.prediction.recomputed_bytes
    assert sum(totals.values()) == plan.step.num_blocks * LAYER.saved_bytes


def test_the_highest_peak_and_the_median_of_all_else_are_compared() -> None:
    plan = measured_plan()
    assert plan.measurement is not None
    memory, step, swapped, _ = compare(plan, plan.measurement)
    assert memory.measured == max(plan.measurement.peak_bytes)
    assert step.measured == sorted(plan.measurement.step_seconds)[1]
    assert [row.is_off for row in (memory, step, swapped)] == [False, True, False]


def test_what_was_not_recorded_is_no_zero() -> None:
    rows = compare(example_plan(), Measurement(step_seconds=(), peak_bytes=()))
    assert all(row.measured is None and row.error is None and not row.is_off for row in rows)


def test_something_where_nothing_was_predicted_is_off() -> None:
    plan = example_plan()
    plan = replace(plan, prediction=replace(plan.prediction, swapped_bytes=0))
    for measured, is_off in ((0, False), (1, True)):
        row = compare(plan, Measurement(step_seconds=(), peak_bytes=(), swapped_bytes=(measured,)))[2]
        assert row.is_off is is_off
