"""plan, apply, wrap, measure, report: where capture, planner, engine and reports meet."""

from __future__ import annotations

import torch

from stowplan.core.allocations import AllocationTrace
from stowplan.core.plan import Plan
from stowplan.offload.head.loss import linear_cross_entropy
from stowplan.offload.measure import Meter
from stowplan.offload.parallel import inner_model
from stowplan.offload.tape.rules import allow_replay
from stowplan.offload.tape.run import Counters
from stowplan.planner.addresses import addresses_of, requests
from stowplan.reports import text
from stowplan.session.applying import AppliedPlan, applied, apply
from stowplan.session.dry import dry
from stowplan.session.making import FORWARD_NOTE
from stowplan.session.pipelines import PipelinePlan
from stowplan.session.planning import plan, replan
from stowplan.session.wrapping import wrap

__all__ = [
    "FORWARD_NOTE",
    "AppliedPlan",
    "Meter",
    "PipelinePlan",
    "allocations",
    "allow_replay",
    "applied",
    "apply",
    "dry",
    "linear_cross_entropy",
    "measure",
    "plan",
    "replan",
    "report",
    "wrap",
]


def measure(model: torch.nn.Module) -> Meter:
    """A context around a few training steps; afterwards ``.measurement`` has peaks, seconds and bytes moved, per step.

    A peak above the budget of the plan in force is told with a warning, or raised (``strict``), or planned for anew
    (``wrap``). The highest live bytes come from torch's own allocator events (CPU) or counters (CUDA).
    """
    model = inner_model(model)
    handle = applied(model)
    return Meter(model, Counters()) if handle is None else Meter(model, handle.counters, handle.measured)


def report(plan: Plan | PipelinePlan) -> str:
    """The plan as text, 100 columns: what fits, what it gains, where memory goes, what every block does.

    With ``plan(..., allocations=True)`` a map of addresses, too. Of a pipeline: schedule, stages, why.
    """
    if isinstance(plan, PipelinePlan):
        return plan.render()
    return text.render(plan, addresses=addresses_of(plan))


def allocations(plan: Plan, *, planned: bool = True) -> AllocationTrace:
    """The buffers of one step of ``plan``: sizes, lifetimes, and what they are for (docs/allocations.md).

    ``planned=False``: with everything kept. What lives all step is not among them. Raises InvalidArgument for a plan
    that was made without ``allocations=True``.
    """
    return requests(plan.step, plan.hardware, plan.decisions if planned else None)
