"""No decisions are given out that the closed form and the simulator do not agree on."""

from __future__ import annotations

from collections.abc import Callable

from stowplan.core.errors import PlanRejected
from stowplan.core.plan import Prediction
from stowplan.core.program import Decisions
from stowplan.planner.activations.evaluate import Evaluation, evaluate
from stowplan.planner.activations.problem import Problem
from stowplan.planner.activations.simulate import simulate

__all__ = ["SECONDS_TOLERANCE", "fits", "verify"]

SECONDS_TOLERANCE = 0.005  # of the step; bytes have none


def verify(
    problem: Problem, decisions: Decisions, *, formula: Callable[[Problem, Decisions], Evaluation] = evaluate
) -> Prediction:
    """The simulator's prediction of ``decisions``, once ``formula`` agrees and both budgets hold.

    Raises PlanRejected with both figures where step seconds differ by more than 0.5%, the peak of any moment or the
    host bytes differ at all, or a budget is exceeded.
    """
    expected, predicted = formula(problem, decisions), simulate(problem, decisions)
    difference = abs(expected.step_seconds - predicted.step_seconds)
    if difference > SECONDS_TOLERANCE * predicted.step_seconds:
        raise PlanRejected(
            f"formula {expected.step_seconds:.6g} s, simulator {predicted.step_seconds:.6g} s per step; "
            f"please report this."
        )
    simulated = [(moment.name, moment.peak_bytes) for moment in predicted.moments]
    if len(simulated) != len(expected.peaks_bytes):
        raise PlanRejected(
            f"formula {len(expected.peaks_bytes)} moments, simulator {len(simulated)}; please report this."
        )
    for (name, seen), formed in zip(simulated, expected.peaks_bytes, strict=True):
        if seen != formed:
            raise PlanRejected(f"{name}: formula {formed} bytes, simulator {seen} bytes; please report this.")
    if expected.host_bytes != predicted.host_bytes:
        raise PlanRejected(
            f"host: formula {expected.host_bytes} bytes, simulator {predicted.host_bytes} bytes; please report this."
        )
    if not fits(problem, predicted):
        raise PlanRejected(
            f"peak {predicted.peak_bytes} of {problem.budget_bytes} bytes, host {predicted.host_bytes} of "
            f"{problem.host_budget_bytes} bytes; please report this."
        )
    return predicted


def fits(problem: Problem, prediction: Prediction) -> bool:
    """Do the predicted bytes stay within both budgets?"""
    return prediction.peak_bytes <= problem.budget_bytes and prediction.host_bytes <= problem.host_budget_bytes
