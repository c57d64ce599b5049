"""The planner as plans are made with it: within a budget that is held by addresses, or allows for fragmentation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from stowplan.core.errors import InfeasibleBudget, SolverFailed
from stowplan.core.hardware import Hardware
from stowplan.core.plan import Prediction, with_fragmentation
from stowplan.core.program import Decisions, StepProgram

if TYPE_CHECKING:
    from stowplan.planner.activations import ActivationPlan

__all__ = ["Solver"]

# For packing each plan that is weighed: step traces take a fraction of it.
_PACKING_SECONDS = 3.0
_LONGER = 10
_HALVINGS = 10  # so that what is found is within a thousandth of what swapping freely takes
_ANY_BYTES = 1 << 60


class Solver(NamedTuple):
    """The planner with everything but the step. Calling it raises as ``planner.activations.solve`` does."""

    hardware: Hardware
    device_bytes: int
    host_bytes: int
    name: str
    time_limit_seconds: float
    tell: Callable[[str], None]
    fragmentation: float = 0.0  # a share of what does not live all step, where no addresses are planned
    packing_seconds: float = _PACKING_SECONDS

    @property
    def patient(self) -> Solver:
        """The same with more time, for what is known to be there."""
        more = _LONGER * self.time_limit_seconds, _LONGER * self.packing_seconds
        return self._replace(time_limit_seconds=more[0], packing_seconds=more[1])

    def __call__(self, step: StepProgram) -> ActivationPlan:
        """The plan for ``step`` within the budget: up to its highest address, where its requests are known."""
        if step.outside is not None:
            return self._with_addresses(step)
        static_bytes, share = step.static_bytes, self.fragmentation
        live_bytes = int((self.device_bytes + share * min(static_bytes, self.device_bytes)) / (1 + share))

        def needed(least_bytes: int) -> int:
            return with_fragmentation(least_bytes, static_bytes, share)

        return self._within(step, live_bytes, needed)

    def _with_addresses(self, step: StepProgram) -> ActivationPlan:
        """Solve for fewer live bytes until the addresses are within the budget, too."""
        live_bytes, answer = self.device_bytes, None
        while True:
            try:
                answer = self._within(step, live_bytes)
            except InfeasibleBudget as error:
                return self._least(step, answer or self._within(step, error.least_bytes), error)
            arena_bytes = self.arena_bytes(step, answer.decisions)
            if arena_bytes <= self.device_bytes:
                least_bytes = min(arena_bytes, self.arena_bytes(step, answer.least_decisions))
                return replace(answer, least_budget_bytes=least_bytes)
            live_bytes = self.device_bytes - (arena_bytes - answer.prediction.peak_bytes)
            self.tell(f"addresses end {arena_bytes - self.device_bytes} bytes over the budget: solving for less")

    def _least(self, step: StepProgram, answer: ActivationPlan, error: InfeasibleBudget) -> ActivationPlan:
        """The plan of least memory, where no other has room. Raises InfeasibleBudget if it does not fit either."""
        from stowplan.planner.activations import Problem, verify

        least_bytes = self.arena_bytes(step, answer.least_decisions)
        if least_bytes > self.device_bytes:
            raise InfeasibleBudget(self.device_bytes, least_bytes, error.host_budget_bytes, error.advice) from None
        problem = Problem(
            step=step, hardware=self.hardware, budget_bytes=self.device_bytes, host_budget_bytes=self.host_bytes
        )
        prediction = verify(problem, answer.least_decisions)
        gap = prediction.step_seconds / answer.solution.bound_seconds - 1
        return replace(
            answer,
            decisions=answer.least_decisions,
            prediction=prediction,
            solution=replace(answer.solution, gap=gap, proof="time limit"),
            least_budget_bytes=least_bytes,
        )

    def arena_bytes(self, step: StepProgram, decisions: Decisions) -> int:
        """The highest address of a step, static bytes below it."""
        from stowplan.planner.addresses import place, requests

        found = place(requests(step, self.hardware, decisions), self.hardware.device_type, self.packing_seconds)
        return step.static_bytes + found.height_bytes

    def _within(
        self, step: StepProgram, live_bytes: int, needed: Callable[[int], int] = lambda num_bytes: num_bytes
    ) -> ActivationPlan:
        """The plan for ``live_bytes``; ``needed`` says what a least number of these takes of the budget."""
        from stowplan.planner.activations import solve

        try:
            answer = solve(
                step,
                self.hardware,
                live_bytes,
                self.host_bytes,
                solver=self.name,
                time_limit_seconds=self.time_limit_seconds,
                on_progress=self.tell,
            )
        except InfeasibleBudget as error:
            raise InfeasibleBudget(
                self.device_bytes, needed(error.least_bytes), error.host_budget_bytes, error.advice
            ) from None
        return replace(answer, least_budget_bytes=needed(answer.least_budget_bytes))

    def least_host_bytes(self, step: StepProgram) -> int | None:
        """The least host budget for which a plan was found, the device budget unchanged; None: none would do.

        Looks for about twice the time limit.
        """
        quiet = self._replace(tell=lambda message: None)
        deadline = time.monotonic() + 2 * self.time_limit_seconds

        def swapped(host_bytes: int) -> int | None:
            try:
                return quiet._replace(host_bytes=host_bytes)(step).prediction.host_bytes
            except (InfeasibleBudget, SolverFailed):  # what is not known to do does not count
                return None

        enough, too_little = swapped(_ANY_BYTES), -1
        for _ in range(_HALVINGS):
            if enough is None or enough - too_little <= 1 or time.monotonic() > deadline:
                break
            half = (enough + too_little) // 2
            found = swapped(half)
            if found is None:
                too_little = half
            else:
                enough = found
        return enough

    def unplanned(self, step: StepProgram) -> Prediction:
        """The step with everything kept."""
        from stowplan.planner.activations import Problem, policies, simulate

        problem = Problem(
            step=step, hardware=self.hardware, budget_bytes=self.device_bytes, host_budget_bytes=self.host_bytes
        )
        return simulate(problem, policies.keep_all(problem))

    def least_bytes(self, step: StepProgram) -> int:
        """The least device budget that has a plan."""
        try:
            return self(step).least_budget_bytes
        except InfeasibleBudget as error:
            return error.least_bytes
