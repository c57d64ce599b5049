"""Addresses for buffers whose lifetimes are known, so that the highest address is least."""

from stowplan.planner.packing.library import prepare
from stowplan.planner.packing.problem import FREE, Problem, Solution
from stowplan.planner.packing.solve import Solver, pack
from stowplan.planner.packing.validate import Verdict, Violation, validate

__all__ = ["FREE", "Problem", "Solution", "Solver", "Verdict", "Violation", "pack", "prepare", "validate"]
