"""The three programs that a plan needs: its lower bound, its decisions, and the least budget. Imports pulp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stowplan.core.errors import SolverFailed
from stowplan.core.program import Action, Decisions
from stowplan.planner.activations.model import (
    Cell,
    Scale,
    add_cell,
    add_device_rows,
    add_host_row,
    add_time_rows,
)
from stowplan.planner.activations.problem import Problem
from stowplan.planner.activations.rounding import Fractions, decide
from stowplan.planner.rows import Answer, Rows

__all__ = ["Found", "Relaxation", "least_memory", "least_seconds", "relax"]

Groups = Sequence[Sequence[int]]
_GRACE = 1e-6  # scaled bytes that the bound may exceed the budget by: a tight budget must not fail by rounding
_SWAP_PENALTY = 1e-6  # of the ideal step for swapping everything: breaks ties towards less traffic


@dataclass(frozen=True, slots=True)
class Relaxation:
    """``bound_seconds``: no plan is faster. ``fractions[block][n]``: how much of saved value n it keeps and swaps."""

    bound_seconds: float
    fractions: Fractions


@dataclass(frozen=True, slots=True)
class Found:
    """Decisions that a solver gave, and whether it proved them best (for the groups that it was given).

    Rows are rounded: decisions of a problem that divides them are proved nothing.
    """

    decisions: Decisions
    proven: bool


def relax(
    problem: Problem, groups: Groups, solver: str, time_limit_seconds: float, *, token_rows: bool = True
) -> Relaxation | None:
    """A lower bound by LP; None if even that fits no budget. Raises SolverFailed if it is not solved in time.

    With ``token_rows`` the rows of all values are divided at will. Without, the bound is for what the problem allows
    and is the higher for it: attention that runs whole costs its share, and replays have their bytes.

    Note: the average is a relaxation. Blocks are not made equal here. Every block has bytes and seconds of its own;
    only their sums over a group must be those of that many copies of one feasible block. The set of feasible blocks is
    convex in this LP, so the average of any feasible blocks is feasible: nothing is lost, and the bound holds for
    plans that treat all blocks differently, at the cost of a few cells.
    """
    scale, rows = Scale.of(problem), Rows()
    blocks: list[Cell | None] = [None] * problem.step.num_blocks
    averages: list[Cell | None] = [None] * problem.step.num_blocks
    for group in groups:
        program = problem.step.program_of(group[0])
        cell = add_cell(rows, program, problem.choices_of(group[0]), scale, integer=False, token_rows=token_rows)
        spread = [cell] if len(group) == 1 else _spread(rows, problem, group, cell, scale)
        for block, own in zip(group, spread, strict=True):
            blocks[block], averages[block] = own, cell
    cells = [cell for cell in blocks if cell is not None]
    add_device_rows(rows, problem, cells, scale, rows.variable(0, problem.budget_bytes / scale.bytes + _GRACE))
    add_host_row(rows, problem, cells, scale)
    rows.minimise([(add_time_rows(rows, problem, cells, scale, relaxed=True), 1)])
    answer = rows.solve(solver, time_limit_seconds, 0.0)
    if answer.infeasible:
        return None
    if not answer.optimal:
        raise SolverFailed(
            f"{solver} did not finish the bound in {time_limit_seconds:.1f} s; raise time_limit_seconds."
        )
    fractions = tuple(
        tuple((float(k.value()), float(s.value())) for k, s in cell.actions) for cell in averages if cell is not None
    )
    return Relaxation(bound_seconds=answer.objective * scale.seconds * (1 - 1e-9), fractions=fractions)


def _spread(rows: Rows, problem: Problem, group: Sequence[int], average: Cell, scale: Scale) -> list[Cell]:
    """Cells of the blocks of ``group`` whose quantities sum up to those of ``average`` times their number."""
    program = problem.step.program_of(group[0])
    inputs = sum(program.values[v].size_bytes for v in program.unsaved_inputs(range(len(program.ops))))
    most = (program.saved_bytes + program.lingering_bytes + inputs) / scale.bytes
    longest = sum(op.seconds for op in program.ops) / scale.seconds
    limits = {"kept": most, "alive": most, "swapped": most, "seconds": longest}
    own = {name: [rows.variable(0, limit) for _ in group] for name, limit in limits.items()}
    own["backward_peak"] = [rows.variable(program.backward_peak_bytes / scale.bytes) for _ in group]
    for name, variables in own.items():
        rows.equal([*((v, 1) for v in variables), (getattr(average, name), -len(group))], 0)
    for kept, alive, swapped in zip(own["kept"], own["alive"], own["swapped"], strict=True):
        rows.at_most([(kept, 1), (swapped, 1)], most)
        rows.at_least([(alive, 1), (kept, -1)], program.lingering_bytes / scale.bytes)
    return [Cell(**dict(zip(own, variables, strict=True))) for variables in zip(*own.values(), strict=True)]


def least_seconds(problem: Problem, groups: Groups, solver: str, time_limit_seconds: float, gap: float) -> Found | None:
    """The fastest decisions that fit, equal within ``groups``; None if the solver found none in time."""
    scale, rows = Scale.of(problem), Rows()
    cells = _shared_cells(rows, problem, groups, scale)
    add_device_rows(rows, problem, cells, scale, rows.variable(0, problem.budget_bytes / scale.bytes))
    add_host_row(rows, problem, cells, scale)
    end = add_time_rows(rows, problem, cells, scale, relaxed=False)
    movable = sum(problem.step.program_of(block).saved_bytes for block in problem.order) / scale.bytes
    price = _SWAP_PENALTY * problem.ideal_seconds / scale.seconds / max(movable, 1e-9)
    rows.minimise([(end, 1), *((cell.swapped, price) for cell in cells)])
    return _found(problem, cells, rows.solve(solver, time_limit_seconds, gap))


def least_memory(problem: Problem, groups: Groups, solver: str, time_limit_seconds: float) -> Found | None:
    """The decisions with the lowest device peak, equal within ``groups``, whatever they cost in time."""
    scale, rows = Scale.of(problem), Rows()
    cells = _shared_cells(rows, problem, groups, scale)
    budget = rows.variable(0)
    add_device_rows(rows, problem, cells, scale, budget)
    add_host_row(rows, problem, cells, scale)
    rows.minimise([(budget, 1)])
    return _found(problem, cells, rows.solve(solver, time_limit_seconds, 0.0))


def _shared_cells(rows: Rows, problem: Problem, groups: Groups, scale: Scale) -> list[Cell]:
    """One cell per group, in the place of each of its blocks."""
    placed: dict[int, Cell] = {}
    for group in groups:
        cell = add_cell(rows, problem.step.program_of(group[0]), problem.choices_of(group[0]), scale)
        placed.update((block, cell) for block in group)
    return [placed[block] for block in problem.order]


def _found(problem: Problem, cells: Sequence[Cell], answer: Answer) -> Found | None:
    if not answer.usable:
        return None
    fractions = []
    for block, cell in enumerate(cells):
        choices = problem.choices_of(block)
        values = [(float(kept.value()), float(swapped.value())) for kept, swapped in cell.actions]
        fractions.append(
            tuple(
                parts if num_rows else _nearest(allowed, *parts)
                for parts, allowed, num_rows in zip(values, choices.actions, choices.num_rows, strict=True)
            )
        )
    return Found(decisions=decide(problem, tuple(fractions)), proven=answer.optimal and not problem.by_rows)


def _nearest(allowed: Sequence[Action], kept: float, swapped: float) -> tuple[float, float]:
    """All of the value for the allowed action with the largest part."""
    parts = {Action.KEEP: kept, Action.SWAP: swapped, Action.RECOMPUTE: 1 - kept - swapped}
    most = max(allowed, key=lambda action: parts[action])
    return float(most is Action.KEEP), float(most is Action.SWAP)
