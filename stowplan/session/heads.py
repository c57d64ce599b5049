"""Whether a model's head is done in chunks of rows: ways are measured, each is planned with, the best is taken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from stowplan.core.errors import InfeasibleBudget
from stowplan.core.head import Head, HeadWay
from stowplan.core.plan import Plan, Prediction
from stowplan.core.program import StepProgram
from stowplan.core.units import format_bytes
from stowplan.offload.blocks import Block
from stowplan.offload.capture.step import Capture
from stowplan.offload.head.chunked import (
    ChunkedHead,
    FoundHead,
    NotReplaceable,
    chunk_sizes,
    failures_refuse,
    find_head,
    try_head,
)
from stowplan.session.solving import Solver

if TYPE_CHECKING:
    from stowplan.planner.activations import ActivationPlan

__all__ = ["PlannedHead", "plan_head", "replan_head"]

# A head is replaced for time alone only if that gains so much of a step: less may be noise of measuring.
_WORTHWHILE = 0.02
# As the simulator names it.
_HEAD = "head"

# How the assumption of a plan begins that says what is done with the head.
_REPLACED, _NOT_REPLACED = "the head is replaced:", "the head is not replaced:"


class PlannedHead(NamedTuple):
    """A solved step: in which way its head is done, and what that rests on, in words.

    ``unplanned`` is the step with everything kept and the model's own head.
    """

    step: StepProgram
    answer: ActivationPlan
    unplanned: Prediction
    head: Head | None = None
    said: tuple[str, ...] = ()

    @property
    def declined(self) -> bool:
        """Is there nothing to do?"""
        return self.answer.declined and not (self.head is not None and self.head.chunk_rows)


def plan_head(
    model: torch.nn.Module,
    blocks: Sequence[Block],
    captured: Capture,
    solver: Solver,
    allowed: bool | None,
    *,
    dry: bool,
) -> PlannedHead:
    """Solve for a captured step, with its head in chunks where that is ``allowed`` and makes it fit, or faster.

    None: the head stays, but where it has the peak, or nothing fits, what chunks would bring is measured, too. Raises
    InfeasibleBudget, which tells that then.
    """
    own, failure = _solved(solver, captured.step)
    if allowed is False or _settled(own, allowed):
        if failure is not None:
            raise failure
        assert own is not None
        return PlannedHead(captured.step, own, own.unplanned)
    try:
        solver.tell("looking at the model's head")
        found = find_head(model, blocks)
        num_rows = try_head(model, found, captured.loss, dry=dry)
        with failures_refuse(model):
            ways = _ways(captured, found, num_rows, only_least=allowed is None)
    except NotReplaceable as reason:
        if failure is not None:
            raise _with_advice(failure, f"The head is not replaced: {reason}." if allowed else "") from None
        assert own is not None
        said = f"{_NOT_REPLACED} {reason}"
        return PlannedHead(captured.step, own, own.unplanned, said=(said,) if allowed else ())
    head = Head(module=found.name, chunk_rows=0, allowed=bool(allowed), ways=ways)
    if allowed:
        planned = _best(captured.step, head, solver, own, failure)
        assert planned.head is not None
        return planned._replace(said=(_choice(planned.head), _proof(dry)))
    if failure is not None:
        raise _with_advice(failure, _prospect(captured.step, head, solver, failure.least_bytes))
    assert own is not None
    return PlannedHead(captured.step, own, own.unplanned, head)


def replan_head(plan: Plan, solver: Solver) -> PlannedHead:
    """Solve anew from what ``plan`` captured; the ways of its head are weighed again if they are allowed.

    What is ``said`` is all that the new plan rests on, with what ``plan`` says of its head put right.
    """
    if plan.head is None:
        answer = solver(plan.step)
        return PlannedHead(plan.step, answer, answer.unplanned, said=plan.assumptions)
    own, failure = _solved(solver, plan.head.own.within(plan.step))
    if not plan.head.allowed and failure is not None:
        raise _with_advice(failure, _prospect(plan.step, plan.head, solver, failure.least_bytes))
    planned = _best(plan.step, plan.head, solver, own, failure)
    assert planned.head is not None
    chosen = _choice(planned.head)
    said = tuple(chosen if line.startswith((_REPLACED, _NOT_REPLACED)) else line for line in plan.assumptions)
    return planned._replace(said=said)


def _settled(own: ActivationPlan | None, allowed: bool | None) -> bool:
    """Is there nothing to tell of chunks, which were not asked for?"""
    return allowed is None and own is not None and (own.declined or own.prediction.peak_moment != _HEAD)


def _solved(solver: Solver, step: StepProgram) -> tuple[ActivationPlan | None, InfeasibleBudget | None]:
    try:
        return solver(step), None
    except InfeasibleBudget as error:
        return None, error


def _ways(captured: Capture, found: FoundHead, num_rows: int, *, only_least: bool) -> tuple[HeadWay, ...]:
    """The model's own way and chunked ones, measured."""
    sizes = chunk_sizes(num_rows, found.layer.out_features)
    ways = [HeadWay.of(captured.step, 0)]
    for size in sizes[:1] if only_least else sizes:
        chunked = ChunkedHead(found.layer, size)
        try:
            ways.append(HeadWay.of(captured.again(), size))
        finally:
            chunked.remove()
    return tuple(ways)


def _best(
    step: StepProgram,
    head: Head,
    solver: Solver,
    own: ActivationPlan | None,
    failure: InfeasibleBudget | None,
) -> PlannedHead:
    """The fastest that fits; the model's own unless chunks gain notably. Its least budget is that of any way.

    Raises InfeasibleBudget, the least of all.
    """
    plain = head.own.within(step)
    unplanned = own.unplanned if own is not None else solver.unplanned(plain)
    best = PlannedHead(plain, own, unplanned, _done(head, 0)) if own is not None else None
    if not head.allowed:
        assert best is not None
        return best
    answers = [own] if own is not None else []
    for way in _undominated(head.ways[1:]):
        chunked = way.within(step)
        answer, too_little = _solved(solver, chunked)
        if too_little is not None and (failure is None or too_little.least_bytes < failure.least_bytes):
            failure = too_little
        if answer is not None:
            answers.append(answer)
            if best is None or _gains(answer, best):
                best = PlannedHead(chunked, answer, unplanned, _done(head, way.chunk_rows))
    if best is None:
        assert failure is not None
        raise failure
    # Those that do not fit need more than the budget, and so more than any of these.
    least_bytes = min(answer.least_budget_bytes for answer in answers)
    return best._replace(answer=replace(best.answer, least_budget_bytes=least_bytes))


def _gains(answer: ActivationPlan, best: PlannedHead) -> bool:
    before = best.answer.prediction.step_seconds
    replaces_own = best.head is not None and not best.head.chunk_rows
    return answer.prediction.step_seconds < before * (1 - _WORTHWHILE if replaces_own else 1)


def _done(head: Head, chunk_rows: int) -> Head:
    return replace(head, chunk_rows=chunk_rows)


def _undominated(ways: Sequence[HeadWay]) -> Iterable[HeadWay]:
    """Those that no other is at least as fast and as small as."""
    fastest = float("inf")
    for way in sorted(ways, key=lambda way: (way.head.peak_bytes, way.head.seconds)):
        if way.head.seconds < fastest:
            fastest = way.head.seconds
            yield way


def _prospect(step: StepProgram, head: Head, solver: Solver, least_bytes: int) -> str:
    """What ``chunked_head=True`` would bring, in words."""
    way = head.chunked
    with_chunks = solver.least_bytes(way.within(step))
    if with_chunks >= least_bytes:
        return ""
    return (
        f"chunked_head=True (--chunked-head) would compute {head.module} and the loss in chunks of {way.chunk_rows} "
        f"rows: the least budget would be {format_bytes(with_chunks)} ({with_chunks} bytes), "
        f"{format_bytes(least_bytes - with_chunks)} less; not bit for bit the same."
    )


def _with_advice(failure: InfeasibleBudget, *more: str) -> InfeasibleBudget:
    advice = " ".join(text for text in (failure.advice, *more) if text)
    return InfeasibleBudget(failure.budget_bytes, failure.least_bytes, failure.host_budget_bytes, advice)


def _choice(head: Head) -> str:
    if not head.chunk_rows:
        return f"{_NOT_REPLACED} the model's own fits, and chunks would not make a step notably faster"
    return f"{_REPLACED} {head.module} and its loss in chunks of {head.chunk_rows} rows"


def _proof(dry: bool) -> str:
    if dry:
        return "the head's loss and gradients in chunks were not compared, as nothing was run"
    return "the head's loss and gradients in chunks were proved within tolerance"
