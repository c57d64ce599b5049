"""The least device budget for which a plan exists, the host budget unchanged."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from stowplan.core.program import Action, Decisions
from stowplan.planner.activations.draft import Draft
from stowplan.planner.activations.groups import group_blocks
from stowplan.planner.activations.problem import Problem
from stowplan.planner.activations.search import improve

__all__ = ["LeastBudget", "find_least_budget", "least_conceivable_bytes"]


@dataclass(frozen=True, slots=True)
class LeastBudget:
    """``num_bytes`` is the peak of ``decisions``; ``proven`` if no decisions have a lower one."""

    num_bytes: int
    decisions: Decisions
    proven: bool


def find_least_budget(
    problem: Problem, known: Iterable[Decisions], solver: str, time_limit_seconds: float, most_groups: int
) -> LeastBudget:
    """The lowest device peak within the host budget; ``problem.budget_bytes`` plays no part.

    Needs no solver where swapping everything, or one of the ``known`` decisions, is as low as is conceivable. Else the
    memory program is solved: exact where every block decides alone and the solver ends in time; otherwise the result
    of its groups, brought down further by descent, is an upper bound on the least budget (``proven`` says which). So it
    is where rows may be divided: the program is solved for whole values and for rounded rows, and descent goes on.
    """
    floor = least_conceivable_bytes(problem)
    goal = replace(problem, budget_bytes=max(1, floor))
    drafts = [Draft(goal, decisions) for decisions in (_all_swapped(problem), *known)]
    best = _lowest(drafts)
    if best is not None and best.peak_bytes == floor:
        return LeastBudget(floor, best.decisions, proven=True)

    from stowplan.planner.activations.programs import least_memory

    deadline = time.monotonic() + time_limit_seconds
    groups = group_blocks(problem, most_groups)
    single = len(groups) == problem.step.num_blocks
    kinds = [problem.undivided] if problem.by_rows else [problem]
    kinds += [problem] if problem.by_rows and single else []
    proven = False
    for number, kind in enumerate(kinds, start=1):
        found = least_memory(kind, groups, solver, time_limit_seconds / 2 / number)
        if found is not None:
            drafts.append(Draft(goal, found.decisions))
            proven = single and found.proven and not problem.by_rows
    if not proven:
        start = _lowest(drafts) or min(drafts, key=lambda draft: draft.excess_bytes)
        descended = Draft(goal, start.decisions, start.footprints)  # it may end beyond the host budget
        improve(descended, deadline)
        drafts.append(descended)
    best = _lowest(drafts)
    assert best is not None, "Problem checks that the host budget holds what can only be swapped"
    return LeastBudget(best.peak_bytes, best.decisions, proven=proven or best.peak_bytes == floor)


def least_conceivable_bytes(problem: Problem) -> int:
    """A device peak that no decisions can be below: nothing staged or replayed, and only what must be kept."""
    step = problem.step
    earlier = step.static_bytes
    peaks = [earlier + step.embedding_forward.peak_bytes]
    kept = []
    for block, program in enumerate(problem.programs):
        values = [program.values[index] for index in program.saved]
        actions = problem.choices_of(block).actions
        forced = [v.size_bytes for v, a in zip(values, actions, strict=True) if a == (Action.KEEP,)]
        lingering = [v.size_bytes for v, a in zip(values, actions, strict=True) if v.lingers and a != (Action.KEEP,)]
        kept.append(program.held_bytes + sum(forced))
        if block in step.gap_before:
            peaks.append(earlier + step.gap_before[block].forward.peak_bytes)
        peaks.append(earlier + step.forward_left_bytes[block] + program.forward_peak_bytes)
        earlier += kept[-1] + program.lingering_bytes + sum(lingering)
    peaks.append(earlier + step.head.peak_bytes)
    held, gradients = sum(kept), 0
    for block in reversed(problem.order):
        program = problem.programs[block]
        held -= kept[block]
        others = step.static_bytes + held
        peaks.append(others + step.backward_left_bytes[block] + gradients + program.backward_peak_bytes)
        gradients += program.gradient_bytes
        if block in step.gap_before:
            peaks.append(others + gradients + step.gap_before[block].backward.peak_bytes)
    last = max(step.embedding_backward.peak_bytes, step.optimizer_step.peak_bytes)
    return max(*peaks, step.static_bytes + gradients + last)


def _all_swapped(problem: Problem) -> Decisions:
    """Everything on the host that may go there; what may not is kept, or recomputed where it must be."""
    order = (Action.SWAP, Action.KEEP, Action.RECOMPUTE)
    return tuple(
        tuple(next(a for a in order if a in actions) for actions in problem.choices_of(block).actions)
        for block in problem.order
    )


def _lowest(drafts: list[Draft]) -> Draft | None:
    """The draft with the lowest device peak among those within the host budget."""
    inside = [draft for draft in drafts if draft.host_bytes <= draft.problem.host_budget_bytes]
    return min(inside, key=lambda draft: draft.peak_bytes, default=None)
