"""When reality exceeds the plan: larger batches, peaks above the budget, allocations that fail.

The CPU's memory cannot be observed in passing, so a made-up observer stands in for CUDA's counters here.
"""

from __future__ import annotations

import copy
import pickle
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stowplan
from stowplan.core.units import format_bytes
from stowplan.offload import observer
from stowplan.offload.observer import is_allocation_failure
from stowplan.offload.tape.run import Run
from stowplan.session import applying, batches
from tests import models

SHAPE = {"batch": 2, "sequence": 128}
NO_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 999 bytes."


class Told:
    """An observer that sees what the test tells it."""

    def __init__(self) -> None:
        self.peak = 0
        self.failures = 0

    def peak_bytes(self) -> int:
        return self.peak

    def forget(self) -> None:
        self.peak = 0

    def num_failures(self) -> int:
        return self.failures


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setattr(applying, "memory_observer", lambda device: told)
    return told


@pytest.fixture(scope="module")
def planned() -> stowplan.Plan:
    roomy = stowplan.plan(models.llama(4), models.batch_for(0, **SHAPE), budget="1GiB", host_budget="1GiB")
    return stowplan.replan(roomy, budget=(roomy.unplanned.peak_bytes + roomy.least_budget_bytes) // 2)


def step(model: torch.nn.Module, **shape: int) -> list[torch.Tensor]:
    model.zero_grad()
    model(**models.batch_for(0, **(SHAPE | shape))).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def is_plain(model: torch.nn.Module, **shape: int) -> bool:
    """A step of the model gives the gradients of one without a plan."""
    return all(torch.equal(a, b) for a, b in zip(step(model, **shape), step(models.llama(4), **shape), strict=True))


def plan_of(model: torch.nn.Module) -> stowplan.Plan:
    handle = stowplan.applied(model)
    assert handle is not None
    return handle.plan


# ---- larger batches --------------------------------------------------------------------------------------------------
def test_a_larger_batch_is_told_once_with_the_numbers(planned: stowplan.Plan) -> None:
    model = models.llama(4)
    with stowplan.apply(planned, model):
        assert is_plain(model)
        assert is_plain(model, sequence=64)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert is_plain(model, sequence=192)
            assert is_plain(model, batch=3)
    (said,) = [str(w.message) for w in warned if "larger batch" in str(w.message)]
    assert f"budget of {format_bytes(planned.budget_bytes)}" in said
    assert "Planned: input_ids 2x128 int64, labels 2x128 int64; this call: input_ids 2x192 int64, labels" in said


def test_a_larger_batch_is_an_error_if_strict(planned: stowplan.Plan) -> None:
    model = models.llama(4)
    with stowplan.apply(planned, model, strict=True):
        assert is_plain(model)
        with pytest.raises(stowplan.PlanMismatch, match=r"2x192 int64.* leave strict= out"):
            step(model, sequence=192)
    wrapped = stowplan.wrap(models.llama(4), budget=planned.budget_bytes, strict=True)
    step(wrapped)
    with pytest.raises(stowplan.PlanMismatch, match="2x192 int64"):
        step(wrapped, sequence=192)


def test_a_plan_that_touches_nothing_is_watched_only_if_strict(planned: stowplan.Plan) -> None:
    roomy = stowplan.replan(planned, budget="1GiB")
    assert roomy.declined
    model = models.llama(4)
    with stowplan.apply(roomy, model):
        step(model, sequence=192)
    with stowplan.apply(roomy, model, strict=True), pytest.raises(stowplan.PlanMismatch):
        step(model, sequence=192)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("batch", [{"x": torch.ones(2, 3), "y": [torch.ones(4), torch.ones(())], "z": None}])
def test_shapes_come_back_out_of_words(batch: Any) -> None:
    described = batches.describe(batch)
    assert described == "x 2x3 float32, y 4 float32, y  float32"
    assert batches.planned_shapes(described) == [("x", (2, 3)), ("y", (4,)), ("y", ())]
    assert batches.describe(torch.ones(1)) == "0 1 float32"
    assert batches.planned_shapes(batches.describe({})) == []


def test_batches_are_compared_by_name_however_they_are_given() -> None:
    def forward(x: torch.Tensor, y: torch.Tensor | None = None) -> None: ...

    small, large = torch.ones(2, 3), torch.ones(2, 4)
    for description in ("0 2x3 float32", "x 2x3 float32"):
        assert not batches.larger_than_planned(description, forward, (small,), {})
        assert not batches.larger_than_planned(description, forward, (small, large), {})  # nothing is known of y
        assert batches.larger_than_planned(description, forward, (large,), {}) == "x 2x4 float32"
        assert batches.larger_than_planned(description, forward, (), {"x": large}) == "x 2x4 float32"


# ---- peaks above the budget ------------------------------------------------------------------------------------------
def warm(model: torch.nn.Module) -> None:
    for _ in range(3):
        step(model)


def test_a_peak_above_the_budget_is_told_once(planned: stowplan.Plan, seen: Told) -> None:
    model = models.llama(4)
    with stowplan.apply(planned, model):
        warm(model)
        seen.peak = planned.budget_bytes
        step(model)
        seen.peak = planned.budget_bytes + 2**20
        with pytest.warns(RuntimeWarning, match=r"a step took .* 1\.00 MiB above the budget of .*stowplan\.wrap"):
            step(model)
        assert seen.peak == 0
        seen.peak = planned.budget_bytes + 2**20
        assert is_plain(model)


def test_steps_that_record_are_not_judged(planned: stowplan.Plan, seen: Told) -> None:
    model = models.llama(4)
    with stowplan.apply(planned, model, strict=True):
        for _ in range(3):
            seen.peak = 2 * planned.budget_bytes
            step(model)
        seen.peak = 2 * planned.budget_bytes
        with pytest.raises(stowplan.BudgetExceeded) as caught:
            step(model)
    assert (caught.value.budget_bytes, caught.value.measured_bytes) == (planned.budget_bytes, 2 * planned.budget_bytes)
    assert str(2 * planned.budget_bytes) in str(caught.value)


def test_wrap_plans_for_less_by_what_was_too_much(planned: stowplan.Plan, seen: Told) -> None:
    budget = planned.budget_bytes
    model = stowplan.wrap(models.llama(4), budget=budget, host_budget="1GiB")
    warm(model)
    excess = (budget - planned.least_budget_bytes) // 4
    for number in (1, 2):  # measured against the user's budget, taken off what was planned for
        seen.peak = budget + excess
        with pytest.warns(RuntimeWarning, match=r"stowplan\.wrap: a step took .* above the budget of .*; planned anew"):
            assert is_plain(model)
        plan = plan_of(model)
        assert plan.budget_bytes == budget - number * excess
        assert plan.prediction.peak_bytes <= plan.budget_bytes
        assert "a step took" in plan.assumptions[-1]
        warm(model)
    seen.peak = budget + 2**30
    with pytest.warns(RuntimeWarning, match="no plan takes so much less .* so it stays"):
        assert is_plain(model)
    assert plan_of(model) is plan


def test_a_larger_batch_later_keeps_the_correction(planned: stowplan.Plan, seen: Told) -> None:
    model = stowplan.wrap(models.llama(4), budget=4 * planned.budget_bytes, host_budget="1GiB")
    warm(model)
    excess_bytes = planned.budget_bytes // 4
    seen.peak = 4 * planned.budget_bytes + excess_bytes
    with pytest.warns(RuntimeWarning, match="planned anew"):
        step(model)
    step(model, sequence=160)
    plan = plan_of(model)
    assert "2x160" in plan.batch
    assert plan.budget_bytes == 4 * planned.budget_bytes - excess_bytes
    assert "as plans before took more" in plan.assumptions[-1]


def test_what_plans_do_not_promise_is_no_excess(planned: stowplan.Plan, seen: Told) -> None:
    model = stowplan.wrap(models.llama(4), budget=planned.budget_bytes, host_budget="1GiB")
    warm(model)
    plan = plan_of(model)
    seen.peak = planned.budget_bytes + planned.budget_bytes // 200
    step(model)
    assert plan_of(model) is plan


def test_wrap_strict_raises_and_plans_nothing(planned: stowplan.Plan, seen: Told) -> None:
    model = stowplan.wrap(models.llama(4), budget=planned.budget_bytes, host_budget="1GiB", strict=True)
    warm(model)
    plan = plan_of(model)
    seen.peak = planned.budget_bytes + 1
    with pytest.raises(stowplan.BudgetExceeded):
        step(model)
    assert plan_of(model) is plan
    assert is_plain(model)


def measured_steps(model: torch.nn.Module, ballast_bytes: int) -> None:
    """A loop that holds memory of its own, as a leak does."""
    with stowplan.measure(model):
        ballast = torch.empty(ballast_bytes, dtype=torch.uint8)
        step(model)
        del ballast


def test_what_measure_sees_on_the_cpu_is_judged(planned: stowplan.Plan) -> None:
    model = models.llama(4)
    with stowplan.apply(planned, model):
        measured_steps(model, planned.budget_bytes)  # a step that records
        step(model)
        with pytest.warns(RuntimeWarning, match="above the budget"):
            measured_steps(model, planned.budget_bytes)
    with stowplan.apply(planned, model, strict=True):
        step(model)
        step(model)
        with pytest.raises(stowplan.BudgetExceeded):
            measured_steps(model, planned.budget_bytes)


def test_what_measure_sees_is_planned_for_by_wrap(planned: stowplan.Plan) -> None:
    model = stowplan.wrap(models.llama(4), budget=planned.budget_bytes, host_budget="1GiB")
    warm(model)
    measured_steps(model, planned.budget_bytes)
    with pytest.warns(RuntimeWarning, match="a step took .* no plan takes so much less"):
        assert is_plain(model)


# ---- allocations that fail -------------------------------------------------------------------------------------------
def fail(*args: Any) -> None:
    raise RuntimeError(NO_MEMORY)


def notes(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error))


@pytest.fixture
def failing_replay(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_source", fail)
        patch.setattr("stowplan.offload.copies.PlainCopies.fetch", fail)
        yield patch


def test_a_failure_in_forward_has_a_note_and_leaves_a_clean_state(planned: stowplan.Plan) -> None:
    model = models.llama(4)
    with stowplan.apply(planned, model):
        warm(model)
        handle = model.model.layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
            step(model)
        handle.remove()
        told = notes(caught.value)
        for fact in ("LlamaForCausalLM", "input_ids 2x128", format_bytes(planned.budget_bytes), "predicted peak"):
            assert fact in told
        assert format_bytes(planned.prediction.peak_bytes) in told
        with pytest.warns(RuntimeWarning, match="an allocation failed under a plan for"):
            assert is_plain(model)
        assert is_plain(model)


def test_a_failure_while_values_come_back_has_a_note(planned: stowplan.Plan, failing_replay: Any) -> None:
    model = models.llama(4)
    with stowplan.apply(planned, model):
        loss = model(**models.batch_for(0, **SHAPE)).loss
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
            loss.backward()
        assert "while values of model.layers." in notes(caught.value)
        assert format_bytes(planned.prediction.peak_bytes) in notes(caught.value)
        failing_replay.undo()
        del loss
        with pytest.warns(RuntimeWarning, match="an allocation failed"):
            assert is_plain(model)


def test_wrap_plans_for_nine_tenths_after_a_failure(planned: stowplan.Plan, seen: Told) -> None:
    model = stowplan.wrap(models.llama(4), budget=planned.budget_bytes, host_budget="1GiB")
    warm(model)
    before = plan_of(model)
    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        step(model)
    handle.remove()
    with pytest.warns(RuntimeWarning, match=r"stowplan\.wrap: an allocation failed .* planned anew for"):
        assert is_plain(model)
    expected = max(before.least_budget_bytes, before.prediction.peak_bytes * 9 // 10)
    assert plan_of(model).budget_bytes == expected
    assert plan_of(model).prediction.peak_bytes <= expected
    seen.failures += 1  # in backward, say, where only the device's counters see it
    with pytest.warns(RuntimeWarning, match="an allocation failed"):
        assert is_plain(model)


def test_other_errors_are_left_alone(planned: stowplan.Plan) -> None:
    model = models.llama(4)
    with stowplan.apply(planned, model), pytest.raises(Exception, match=r".") as caught:
        model(input_ids="no tensor")
    assert not getattr(caught.value, "__notes__", [])


def test_what_counts_as_an_allocation_failure() -> None:
    assert is_allocation_failure(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_allocation_failure(MemoryError())
    assert is_allocation_failure(RuntimeError(NO_MEMORY))
    assert not is_allocation_failure(RuntimeError("shapes cannot be multiplied"))
    assert not is_allocation_failure(ValueError(NO_MEMORY))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_allocation_failure(caught.value)


def test_the_cpu_is_not_observed() -> None:
    unobserved = observer.memory_observer(torch.device("cpu"))
    unobserved.forget()
    assert (unobserved.peak_bytes(), unobserved.num_failures()) == (None, 0)


@pytest.mark.parametrize("remake", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_budget_exceeded_travels_between_processes(remake: Any) -> None:
    error = stowplan.BudgetExceeded(10, 12)
    again = remake(error)
    assert (again.budget_bytes, again.measured_bytes, str(again)) == (10, 12, str(error))
