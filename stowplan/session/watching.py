"""Reality beside the plan: batches that are larger, peaks above the budget, allocations that fail."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from stowplan.core.errors import BudgetExceeded, PlanMismatch
from stowplan.core.plan import Plan
from stowplan.core.units import format_bytes
from stowplan.offload.intercept import Forward
from stowplan.offload.observer import MemoryObserver, is_allocation_failure
from stowplan.offload.tape.run import Counters
from stowplan.session.batches import larger_than_planned

__all__ = ["Excess", "Watch", "failure_note"]


class Excess(NamedTuple):
    """What a step took beyond its plan; ``measured_bytes`` is None where an allocation failed instead."""

    budget_bytes: int
    measured_bytes: int | None

    def __str__(self) -> str:
        if self.measured_bytes is None:
            return f"an allocation failed under a plan for {format_bytes(self.budget_bytes)}"
        excess_bytes = self.measured_bytes - self.budget_bytes
        return (
            f"a step took {format_bytes(self.measured_bytes)} of device memory, {format_bytes(excess_bytes)} above the "
            f"budget of {format_bytes(self.budget_bytes)}"
        )


# A peak may be above its prediction, and so above a budget that the plan fills, by so much without a word. Strict plans
# tolerate nothing.
TOLERATED = 0.01


class Watch:
    """Looks, once per training forward, at what the steps before took. Says each thing once.

    ``budget_bytes`` is the user's, which a corrected plan's own budget may be below. With ``strict`` an excess is an
    error and not a warning.
    """

    def __init__(
        self, plan: Plan, budget_bytes: int, counters: Counters, observer: MemoryObserver, strict: bool
    ) -> None:
        self.plan = plan
        self.budget_bytes = budget_bytes
        self.strict = strict
        self._counters = counters
        self._observer = observer
        self._num_recorded = -1
        self._num_failures = observer.num_failures()
        self._measured_bytes = 0
        self._failed = False
        self._said: set[str] = set()

    def batch(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Warn if this call's batch is larger than the plan's. Raises PlanMismatch if strict."""
        if "batch" in self._said:
            return
        given = larger_than_planned(self.plan.batch, forward, args, kwargs)
        if not given:
            return
        said = (
            f"the model is called with a larger batch than was planned for, and may take more than the budget of "
            f"{format_bytes(self.budget_bytes)}. Planned: {self.plan.batch}; this call: {given}."
        )
        if self.strict:
            raise PlanMismatch(f"{said} Plan anew with the larger batch, or leave strict= out.")
        self._said.add("batch")
        warnings.warn(
            f"{said} Plan anew with the larger batch, or use stowplan.wrap, which does.", RuntimeWarning, stacklevel=2
        )

    def measured(self, peak_bytes: int) -> None:
        """Somebody has measured a step without recordings."""
        self._measured_bytes = max(self._measured_bytes, peak_bytes)

    @contextmanager
    def failures_noted(self) -> Iterator[None]:
        """An allocation that fails inside is raised on with a note on the plan."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_allocation_failure(error):
                self._failed = True
                error.add_note(failure_note(self.plan))
            raise

    def excess(self) -> Excess | None:
        """What the steps since the last call took beyond the plan.

        Peaks are not judged where a block was recorded meanwhile: a recording holds more than a step.
        """
        peak_bytes = self._observer.peak_bytes() or 0
        if peak_bytes > self.budget_bytes:
            self._observer.forget()
        if self._counters.recorded_calls == self._num_recorded:
            self.measured(peak_bytes)
        self._num_recorded = self._counters.recorded_calls
        num_failures = self._observer.num_failures() + self._counters.allocation_failures
        failed = self._failed or num_failures > self._num_failures
        measured_bytes, self._measured_bytes = self._measured_bytes, 0
        self._num_failures, self._failed = num_failures, False
        if failed:
            return Excess(self.budget_bytes, None)
        tolerated_bytes = 0 if self.strict else int(self.budget_bytes * TOLERATED)
        beyond = measured_bytes > self.budget_bytes + tolerated_bytes
        return Excess(self.budget_bytes, measured_bytes) if beyond else None

    def judge(self) -> None:
        """Warn of an excess, once of each kind. Raises BudgetExceeded if strict."""
        excess = self.excess()
        if excess is None:
            return
        if self.strict and excess.measured_bytes is not None:
            raise BudgetExceeded(excess.budget_bytes, excess.measured_bytes)
        kind = "failure" if excess.measured_bytes is None else "peak"
        if kind not in self._said:
            self._said.add(kind)
            advice = "Plan anew with a smaller budget=, or use stowplan.wrap, which does."
            warnings.warn(f"{excess}. {advice}", RuntimeWarning, stacklevel=2)


def failure_note(plan: Plan) -> str:
    """What to say of an allocation that failed under ``plan``."""
    return (
        f"stowplan: a plan for {plan.model} ({plan.batch}) was in force: budget {format_bytes(plan.budget_bytes)}, "
        f"predicted peak {format_bytes(plan.prediction.peak_bytes)}, least budget that has a plan "
        f"{format_bytes(plan.least_budget_bytes)}. Other processes, fragmentation and a larger batch come on top of a "
        f"plan: plan anew with a smaller budget=, or use stowplan.wrap, which does at the next step."
    )
