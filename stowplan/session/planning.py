"""Plans, as users ask for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch

from stowplan.core.errors import InfeasibleBudget, InvalidArgument
from stowplan.core.hardware import Hardware, preset
from stowplan.core.plan import Plan
from stowplan.core.units import parse_bytes
from stowplan.offload.blocks import Blocks
from stowplan.offload.calibrate import measure_hardware
from stowplan.offload.dry.run import is_fake
from stowplan.offload.parallel import inner_model
from stowplan.runtime.snapshot.reservation import SnapshotMemory
from stowplan.session.dry import plan_dry
from stowplan.session.heads import replan_head
from stowplan.session.making import RESERVED, Batch, LossFunction, Options, Size, budgets_here, device_of, make_plan
from stowplan.session.snapshots import counting_snapshots
from stowplan.session.solving import Solver

if TYPE_CHECKING:
    from stowplan.runtime.pipeline.pipeline import Pipeline
    from stowplan.session.pipelines import PipelinePlan

__all__ = ["plan", "replan"]


@overload
def plan(
    model: torch.nn.Module,
    batch: Any,
    *,
    budget: Size = "auto",
    host_budget: Size = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFunction | None = None,
    hardware: Hardware | str | None = None,
    blocks: Blocks = None,
    solver: str = "HiGHS",
    time_limit_seconds: float = 5.0,
    hold_gradients: bool = False,
    hold_output: bool = True,
    chunked_head: bool | None = None,
    dry: bool | None = None,
    exact: bool = True,
    tolerance: float | None = None,
    allocations: bool = False,
    snapshots: SnapshotMemory | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Plan: ...


@overload
def plan(
    model: Pipeline,
    batch: Any = None,
    *,
    budget: Size = "auto",
    host_budget: Size = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    solver: str = "HiGHS",
    time_limit_seconds: float = 5.0,
    exact: bool = True,
    tolerance: float | None = None,
    snapshots: SnapshotMemory | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> PipelinePlan: ...


def plan(
    model: torch.nn.Module | Pipeline,
    batch: Any = None,
    *,
    budget: Size = "auto",
    host_budget: Size = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFunction | None = None,
    hardware: Hardware | str | None = None,
    blocks: Blocks = None,
    solver: str = "HiGHS",
    time_limit_seconds: float = 5.0,
    hold_gradients: bool = False,
    hold_output: bool = True,
    chunked_head: bool | None = None,
    dry: bool | None = None,
    exact: bool = True,
    tolerance: float | None = None,
    allocations: bool = False,
    snapshots: SnapshotMemory | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Plan | PipelinePlan:
    """Decide what each block of ``model`` keeps, swaps and recomputes, for the least step time within the budgets.

    Runs one block of each kind and the model around it on ``batch``; parameters, gradients, optimizer states, buffers
    and random generators are afterwards as before. Call it under ``torch.autocast`` if the forward pass runs so.
    Of a model in ``DistributedDataParallel`` the inner one is planned, and the reducer's buckets are counted. Where
    ``fully_shard`` was called, every process must plan at the same time: parameters are gathered meanwhile.
    A dry capture does not run the model: it adds up bytes and seconds of fake tensors (docs/dry_capture.md).
    Of a ``Pipeline`` the schedule and all stages' plans are chosen together (docs/pipeline.md), with the arguments of
    its own signature; the answer is a ``PipelinePlan``.

    Args:
        batch: what the model is called with: a dict (keyword arguments), a tuple or list (positional), or one tensor.
        budget: device bytes this process may use, as an int or ``"60GiB"``; ``"auto"``: what is free, less 1 GiB.
        host_budget: host bytes for swapped values, and for ``snapshots``; ``"auto"``: four fifths of what is available.
        optimizer: its states and its step count towards the budget.
        loss_fn: ``loss_fn(output, batch)`` gives the loss; default: the output's ``loss``, or a scalar output.
        hardware: a description or a preset's name, of a machine that need not be there; default: measured here.
        blocks: the blocks' container by dotted name, several such names, or the modules; default: all stacks of like
            modules but small ones of another kind than the largest.
        solver: a PuLP solver by name.
        time_limit_seconds: for solving, with each way of the head that is weighed; capture comes on top.
        hold_gradients: gradients stay allocated between steps (accumulation, ``zero_grad(set_to_none=False)``).
        hold_output: the loop holds the model's output (its logits) until backward is over, as after
            ``output = model(batch)``; False for loops that keep the loss alone.
        chunked_head: whether the last layer and its cross entropy may be computed in chunks of rows, so that the logits
            are never all there: not bit for bit the same, and the output has no logits to read (docs/head.md). Default:
            no, but the plan or the error says what it would bring where the head has the peak. False: not a word of it.
        dry: capture without running the model. Default: where it cannot run, because it was built without data
            (``stowplan.dry()``, the meta device) or ``hardware`` is another kind of device than the model is on.
        exact: losses and gradients equal the plain run's bit for bit. False allows rows of values to be recomputed
            alone where they differ by no more than ``tolerance`` from those of the whole.
        tolerance: that difference, relative to the value's largest number. Default: 1e-5 for float32, 1/128 for
            bfloat16 and float16. With ``exact=False`` only.
        allocations: capture every request of memory, too: then the budget is held by addresses, not by live bytes
            alone, and ``stowplan.allocations`` tells the step's buffers (docs/allocations.md).
        snapshots: a ``Snapshotter`` will take snapshots, and how: what they take of the host is left to them. Counted
            are the model and, if it is given, ``optimizer`` (docs/snapshots.md).
        on_progress: called with a line of text as the work goes on.

    Raises:
        InfeasibleBudget: names the least feasible budget, and with snapshots the least host budget.
        InvalidArgument: a size, batch, hardware or solver that cannot be used, or a state that snapshots cannot hold.
        UnsupportedModel: the model cannot be captured as it is; says what to change.
    """
    if not isinstance(model, torch.nn.Module):
        from stowplan.session.pipelines import plan_pipeline

        others = (loss_fn, hardware, blocks, hold_gradients, not hold_output, chunked_head, dry, allocations)
        if any(others):
            raise InvalidArgument(
                "a pipeline is planned as it is built and where it is: allowed beside the batch are budget=, "
                "host_budget=, optimizer=, solver=, time_limit_seconds=, exact=, tolerance=, snapshots= and "
                "on_progress=."
            )
        return plan_pipeline(
            model,
            batch,
            budget=budget,
            host_budget=host_budget,
            optimizer=optimizer,
            solver=solver,
            time_limit_seconds=time_limit_seconds,
            exact=exact,
            tolerance=tolerance,
            snapshots=snapshots,
            on_progress=on_progress,
        )
    say = on_progress if on_progress is not None else lambda message: None
    device = device_of(model)
    machine = preset(hardware) if isinstance(hardware, str) else hardware
    elsewhere = machine is not None and machine.device_type != device.type
    options = Options(
        budget,
        host_budget,
        optimizer,
        blocks,
        solver,
        time_limit_seconds,
        hold_gradients,
        hold_output,
        say,
        chunked_head,
        exact,
        tolerance,
        allocations=allocations,
        snapshots=snapshots,
    ).around(model)
    _ = options.rounding  # a mistake is told before anything runs
    model = inner_model(model)
    if dry or (dry is None and (elsewhere or is_fake(model))):
        return plan_dry(model, batch, loss_fn, machine, options)
    if elsewhere or is_fake(model):
        raise InvalidArgument(
            f"dry=False, but the model {'has no data' if is_fake(model) else f'is on {device}'} and is to be planned "
            f"for {machine.name if machine is not None else device}: move it there, or leave dry= out."
        )
    run = Batch(model, batch, loss_fn)
    say("measuring the machine")
    machine = machine or measure_hardware(device)
    return make_plan(model, run.forward, run.loss_of, batch, machine, budgets_here(options, model, device), options)


def replan(
    plan: Plan,
    *,
    budget: Size,
    host_budget: Size | None = None,
    solver: str = "HiGHS",
    time_limit_seconds: float = 5.0,
    on_progress: Callable[[str], None] | None = None,
) -> Plan:
    """Decide anew for other budgets, from what ``plan`` captured: no model, no batch, no device is needed.

    ``host_budget`` defaults to the plan's own; what snapshots take of it stays. Raises as ``plan`` does.
    """
    device_bytes = parse_bytes(budget, "budget")
    host_bytes = plan.host_budget_bytes if host_budget is None else parse_bytes(host_budget, "host_budget")
    left_bytes = host_bytes - plan.snapshot_bytes
    tell = on_progress if on_progress is not None else lambda message: None
    solve = Solver(plan.hardware, device_bytes, left_bytes, solver, time_limit_seconds, tell, plan.fragmentation)
    feasible = device_bytes >= plan.least_budget_bytes and host_bytes >= plan.host_budget_bytes
    with counting_snapshots(solve, plan.step, plan.snapshots):
        try:
            chosen = replan_head(plan, solve)
        except InfeasibleBudget:
            if not feasible:
                raise
            tell("a plan for this budget was found before, and is not in this time: solving for longer")
            chosen = replan_head(plan, solve.patient)
    answer = chosen.answer
    return replace(
        plan,
        budget_bytes=device_bytes,
        host_budget_bytes=host_bytes,
        decisions=answer.decisions,
        prediction=answer.prediction,
        unplanned=chosen.unplanned,
        solution=answer.solution,
        least_budget_bytes=answer.least_budget_bytes,
        baselines=answer.baselines,
        declined=chosen.declined,
        step=chosen.step,
        assumptions=tuple(line for line in chosen.said if line != RESERVED),
        head=chosen.head,
        arena_bytes=None if chosen.step.outside is None else solve.arena_bytes(chosen.step, answer.decisions),
        measurement=None,
    )
