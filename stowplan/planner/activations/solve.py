"""Plan the activations of one step: bound, solver, search, check.

Every way to decisions is a candidate — the baselines, the least-memory solution, the relaxation rounded block by
block, the solver's answer, each improved by search, with rows divided where they may be and without — and the fastest
that fits by simulation is the plan. No single one has to succeed for a plan to be good: the gap to the bound says how
good it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stowplan.core.errors import InfeasibleBudget, SolverFailed
from stowplan.core.hardware import Hardware
from stowplan.core.plan import Baseline, Prediction, Solution
from stowplan.core.program import Action, Decisions, Split, StepProgram
from stowplan.core.units import format_seconds
from stowplan.planner.activations.advice import advise
from stowplan.planner.activations.draft import Draft
from stowplan.planner.activations.footprint import Footprints
from stowplan.planner.activations.groups import group_blocks
from stowplan.planner.activations.least import find_least_budget
from stowplan.planner.activations.policies import POLICIES
from stowplan.planner.activations.problem import Problem
from stowplan.planner.activations.rounding import decide
from stowplan.planner.activations.search import improve
from stowplan.planner.activations.simulate import simulate
from stowplan.planner.activations.verify import fits, verify

if TYPE_CHECKING:
    from stowplan.planner.activations.programs import Relaxation

__all__ = ["ActivationPlan", "solve"]

MOST_SINGLE_BLOCKS = 12  # up to here every block decides alone in the solver: it still ends within a second or two
MOST_GROUPS = 8
_LEAST_SHARE, _ROUNDING_SHARE, _SOLVER_SHARE = 0.1, 0.3, 0.35  # of the time limit; the rest is for the last search
_SEARCH_END = 0.95  # of the time limit: what follows is the check
_ROWS_SHARE = 0.6  # of the time that is left goes to plans with rows where there are such; the rest to whole values
_FITTING_SHARE = 0.6  # of a search, at most, goes into the rounded relaxation until it fits
_PROGRAM_SHARE = 0.1  # of the time limit: with less of it left, the program of many blocks is not begun
_WORTHWHILE_SHARE = 0.35  # of the time limit: with less of it left, whole values are not tried by themselves
_SEARCH_GAP = 0.1  # of the gap asked for: where search stops, because on the way there it is cheap


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationPlan:
    """Decisions for every saved value, what they cost, how they were found, and what others would cost.

    ``unplanned`` is the prediction with everything kept. ``declined``: that fits, and there is nothing to do.
    ``least_decisions`` take ``least_budget_bytes``, or they are ``decisions`` themselves.
    """

    decisions: Decisions
    prediction: Prediction
    unplanned: Prediction
    solution: Solution
    least_budget_bytes: int
    least_decisions: Decisions
    baselines: tuple[Baseline, ...]
    declined: bool


def solve(
    step: StepProgram,
    hardware: Hardware,
    budget_bytes: int,
    host_budget_bytes: int,
    *,
    solver: str = "HiGHS",
    time_limit_seconds: float = 5.0,
    gap: float = 0.01,
    on_progress: Callable[[str], None] | None = None,
) -> ActivationPlan:
    """The fastest found decisions whose simulated peak fits ``budget_bytes`` and whose swaps ``host_budget_bytes``.

    ``solver`` is a name that ``pulp.listSolvers(onlyAvailable=True)`` gives; ``gap`` is relative step time. Where
    keeping everything fits, that is the plan, and a solver runs only if the least budget cannot be told without one.

    Raises InvalidArgument for a step, hardware or budget that cannot be planned for, InfeasibleBudget naming the least
    budget, SolverFailed for an unknown solver or one without a usable answer, PlanRejected if simulator and formulas
    disagree.
    """
    began = time.monotonic()
    tell = on_progress if on_progress is not None else lambda text: None
    problem = Problem(step=step, hardware=hardware, budget_bytes=budget_bytes, host_budget_bytes=host_budget_bytes)
    named = {name: policy(problem) for name, policy in POLICIES.items()}
    baselines = tuple(_baseline(problem, name, decisions) for name, decisions in named.items())
    unplanned = baselines[list(named).index("keep all")]
    least = find_least_budget(problem, named.values(), solver, _LEAST_SHARE * time_limit_seconds, MOST_SINGLE_BLOCKS)
    tell(f"least budget {least.num_bytes} bytes{'' if least.proven else ' or less'}")
    all_kept = all(decision is Action.KEEP for chosen in named["keep all"] for decision in chosen)
    declined = all_kept and unplanned.fits
    if declined:
        decisions = named["keep all"]
        bound_seconds, proof = unplanned.prediction.step_seconds, "nothing to decide"
    else:
        if least.num_bytes > budget_bytes:
            advice = advise(budget_bytes, simulate(problem, least.decisions))
            raise InfeasibleBudget(budget_bytes, least.num_bytes, host_budget_bytes, advice)
        fitting = [named[baseline.name] for baseline in baselines if baseline.fits]
        search = _Search(problem, [*fitting, least.decisions], solver, gap, began, time_limit_seconds, tell)
        decisions, bound_seconds, proof = search.run()
    prediction = verify(problem, decisions)
    seconds = time.monotonic() - began
    loss = max(0.0, prediction.step_seconds / bound_seconds - 1) if bound_seconds else 0.0
    tell(f"{format_seconds(prediction.step_seconds)} per step, {loss:.2%} above the bound, in {seconds:.1f} s")
    return ActivationPlan(
        decisions=decisions,
        prediction=prediction,
        unplanned=unplanned.prediction,
        solution=Solution(
            solver="none" if declined else solver, seconds=seconds, bound_seconds=bound_seconds, gap=loss, proof=proof
        ),
        least_budget_bytes=min(least.num_bytes, prediction.peak_bytes),
        least_decisions=least.decisions if least.num_bytes < prediction.peak_bytes else decisions,
        baselines=baselines,
        declined=declined,
    )


def _baseline(problem: Problem, name: str, decisions: Decisions) -> Baseline:
    prediction = simulate(problem, decisions)
    return Baseline(name=name, fits=fits(problem, prediction), prediction=prediction)


@dataclass(slots=True)
class _Search:
    """The candidates for one problem and the time that is left for them."""

    problem: Problem
    known: list[Decisions]
    solver: str
    gap: float
    began: float
    time_limit_seconds: float
    tell: Callable[[str], None]

    def run(self) -> tuple[Decisions, float, str]:
        """(fastest decisions that fit, bound in seconds, proof)."""
        problem = self.problem
        bound = self._bound(problem, token_rows=True)
        self.tell(f"no plan is faster than {format_seconds(bound.bound_seconds)}")
        best, reachable_seconds, proven = self._decide(problem, self.known, _ROWS_SHARE if problem.by_rows else 1.0)
        missed = best.excess_bytes or best.seconds > self._goal(reachable_seconds)
        if problem.by_rows and missed and self._left() > _WORTHWHILE_SHARE * self.time_limit_seconds:
            whole = problem.undivided
            known = [decisions for decisions in self.known if not _divides(decisions)]
            known.append(POLICIES["memo"](whole))
            other, _, _ = self._decide(whole, known, 1.0)
            best = _fastest([best, Draft(problem, other.decisions)])
            improve(best, self._after(1.0), self._goal(reachable_seconds))
        within = best.seconds <= max(bound.bound_seconds, reachable_seconds) * (1 + self.gap)
        proof = "optimal" if proven else "within gap" if within else "time limit"
        return best.decisions, bound.bound_seconds, proof

    def _decide(self, problem: Problem, known: list[Decisions], share: float) -> tuple[Draft, float, bool]:
        """(the fastest draft found in ``share`` of the time left, a bound for such plans, is that proved best)."""
        from stowplan.planner.activations.programs import least_seconds

        deadline = self._after(share)
        groups = group_blocks(problem, MOST_SINGLE_BLOCKS)
        reachable = self._bound(problem, token_rows=False)
        kind = "with rows divided" if problem.by_rows else "of whole values"
        self.tell(f"none {kind} is faster than {format_seconds(reachable.bound_seconds)}")
        goal = self._goal(reachable.bound_seconds)
        footprints = Footprints(problem)
        rounded = Draft(problem, decide(problem, reachable.fractions), footprints)
        improve(rounded, self._after(_FITTING_SHARE, deadline), math.inf)  # until it fits: before that it is of no use
        improve(rounded, self._after(_ROUNDING_SHARE, deadline), goal)
        drafts = [*(Draft(problem, decisions, footprints) for decisions in known), rounded]
        best = _fastest(drafts)
        proven = False
        alone = all(len(group) == 1 for group in groups)
        room = deadline - time.monotonic() > _PROGRAM_SHARE * self.time_limit_seconds
        if alone or (room and (best.excess_bytes or best.seconds > goal)):
            if not alone:
                groups = group_blocks(problem, MOST_GROUPS)
            limit = min(_SOLVER_SHARE * self.time_limit_seconds * share, max(0.1, deadline - time.monotonic()))
            found = least_seconds(problem, groups, self.solver, limit, self.gap)
            proven = alone and found is not None and found.proven
            if found is not None:
                drafts.append(Draft(problem, found.decisions, footprints))
            improve(drafts[-1], deadline, goal)
            best = _fastest(drafts)
        improve(best, deadline, goal)
        return best, reachable.bound_seconds, proven

    def _bound(self, problem: Problem, *, token_rows: bool) -> Relaxation:
        from stowplan.planner.activations.programs import relax

        groups = group_blocks(problem, MOST_SINGLE_BLOCKS)
        found = relax(problem, groups, self.solver, self.time_limit_seconds, token_rows=token_rows)
        if found is None:
            raise SolverFailed(
                f"{self.solver} calls the relaxation of a feasible problem infeasible; try another solver."
            )
        return found

    def _goal(self, bound_seconds: float) -> float:
        """Where search stops."""
        return bound_seconds * (1 + self.gap * _SEARCH_GAP)

    def _left(self) -> float:
        return max(0.1, self.began + _SEARCH_END * self.time_limit_seconds - time.monotonic())

    def _after(self, share: float, until: float | None = None) -> float:
        """The moment when ``share`` of the time that is left now (until ``until``, or the end) has passed."""
        left = self._left() if until is None else max(0.1, until - time.monotonic())
        return time.monotonic() + share * left


def _divides(decisions: Decisions) -> bool:
    return any(isinstance(decision, Split) for chosen in decisions for decision in chosen)


def _fastest(drafts: list[Draft]) -> Draft:
    """The fastest draft that fits, or the nearest to fitting; fewer swapped bytes where equally fast."""
    return min(drafts, key=lambda draft: (draft.excess_bytes, draft.seconds, draft.host_bytes))
