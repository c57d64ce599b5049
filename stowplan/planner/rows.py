"""Linear rows for PuLP, and a solver called by its name. Imports pulp: import this module only to solve."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

try:
    import pulp
except ImportError as error:  # pragma: no cover
    from stowplan.core.errors import MissingDependency

    raise MissingDependency("this needs a MIP solver: pip install pulp highspy (or stowplan[plan]).") from error

from stowplan.core.errors import SolverFailed

__all__ = ["Answer", "Rows", "Terms", "Variable"]

Variable: TypeAlias = Any  # pulp.LpVariable: pulp has no type hints that hold
Terms = Iterable[tuple[Variable, float]]
_NUM_THREADS = 1  # the same answer every time, and the other cores stay with the user's job


@dataclass(frozen=True, slots=True)
class Answer:
    """What a solver says. ``optimal`` within the gap asked for; else values are the best found, if ``usable``."""

    usable: bool
    optimal: bool
    infeasible: bool
    objective: float


class Rows:
    """A linear program under construction; every row is a sum of (variable, coefficient) pairs against a number."""

    def __init__(self) -> None:
        self._problem = pulp.LpProblem("program", pulp.LpMinimize)
        self._num_variables = 0

    def variable(self, least: float | None = 0.0, most: float | None = None, *, integer: bool = False) -> Variable:
        """A new variable between ``least`` and ``most``."""
        self._num_variables += 1
        kind = pulp.LpInteger if integer else pulp.LpContinuous
        return self._problem.add_variable(f"x{self._num_variables}", least, most, kind)

    def at_least(self, terms: Terms, limit: float) -> None:
        self._add(terms, pulp.LpConstraintGE, limit)

    def at_most(self, terms: Terms, limit: float) -> None:
        self._add(terms, pulp.LpConstraintLE, limit)

    def equal(self, terms: Terms, limit: float) -> None:
        self._add(terms, pulp.LpConstraintEQ, limit)

    def total(self, terms: Terms, constant: float = 0.0) -> Variable:
        """A new free variable equal to the sum of ``terms`` and ``constant``."""
        result = self.variable(None)
        self.equal([(result, 1.0), *((variable, -factor) for variable, factor in terms)], constant)
        return result

    def minimise(self, terms: Terms) -> None:
        self._problem.setObjective(_expression(terms))

    def solve(self, solver: str, time_limit_seconds: float, gap: float) -> Answer:
        """Run the solver called ``solver``. Raises SolverFailed for unknown names, naming those there are.

        A solver at its time limit may report success with values that mean nothing: decisions read from them must be
        evaluated before they are believed.
        """
        limit = max(0.1, time_limit_seconds)
        status = self._run(solver, _solver(solver, limit, gap))
        if status == pulp.LpStatusInfeasible and solver == "HiGHS":
            # HiGHS 1.15's presolve calls some feasible programs infeasible (tests/planner/test_solve.py has one).
            status = self._run(solver, _solver(solver, limit, gap, presolve="off"))
        found = self._problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
        values = [variable.value() for variable in self._problem.variables()]
        usable = status == pulp.LpStatusOptimal and found and None not in values
        return Answer(
            usable=usable,
            optimal=usable and self._problem.sol_status == pulp.LpSolutionOptimal and self._within(gap),
            infeasible=status == pulp.LpStatusInfeasible,
            objective=float(pulp.value(self._problem.objective)) if usable else float("nan"),
        )

    def _run(self, name: str, solver: pulp.LpSolver) -> int:
        try:
            return int(self._problem.solve(solver))
        except pulp.PulpError as error:
            raise SolverFailed(f"solver {name!r} failed: {error}; try another of {_available()}.") from error

    def _within(self, gap: float) -> bool:
        """Is the gap that HiGHS reports within ``gap``? Solvers that report none are taken at their word."""
        model = getattr(self._problem, "solverModel", None)
        if model is None or not hasattr(model, "getInfo") or not self._problem.isMIP():
            return True
        return float(model.getInfo().mip_gap) <= gap + 1e-9

    def _add(self, terms: Terms, sense: int, limit: float) -> None:
        self._problem.addConstraint(pulp.LpConstraint(_expression(terms), sense, rhs=limit))


def _expression(terms: Terms) -> pulp.LpAffineExpression:
    """Sum of ``terms``, adding up coefficients of a variable that occurs more than once."""
    summed: dict[Variable, float] = {}
    for variable, factor in terms:
        summed[variable] = summed.get(variable, 0.0) + factor
    return pulp.LpAffineExpression(summed)


def _available() -> str:
    return ", ".join(pulp.listSolvers(onlyAvailable=True))


def _solver(name: str, time_limit_seconds: float, gap: float, **more: str) -> pulp.LpSolver:
    if name not in pulp.listSolvers(onlyAvailable=True):
        raise SolverFailed(f"solver={name!r} is not available; allowed here: {_available()}.")
    options = {"msg": False, "timeLimit": time_limit_seconds, **more}
    try:
        return pulp.getSolver(name, **options, gapRel=gap, threads=_NUM_THREADS)
    except TypeError:  # some solvers of PuLP take no gap or no number of threads
        return pulp.getSolver(name, **options)
