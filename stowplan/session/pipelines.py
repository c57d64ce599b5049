"""Planning a pipeline: its schedule, and what each stage does with its activations, chosen together.

1. Each stage is captured with one microbatch, and solved for a few sizes between the least and everything kept.
2. Each of these is carried out on the stage for a microbatch, and measured: bytes and seconds, with deferred weight
   gradients and all. So a stage has a menu of costs.
3. ``planner.schedule.joint`` looks for the fastest schedule and choice within the budget of a device. The first device
   decides, and tells the others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch

from stowplan.core.errors import InfeasibleBudget, InfeasibleSchedule, InvalidArgument
from stowplan.core.plan import Plan
from stowplan.core.schedule import Kind, Schedule
from stowplan.core.units import format_bytes, parse_bytes
from stowplan.offload.calibrate import device_budget_bytes, host_budget_bytes
from stowplan.planner.schedule import StageCosts, Timeline
from stowplan.planner.schedule.joint import Choice, Trial, choose
from stowplan.reports.lines import wrap
from stowplan.reports.pipeline import PipelineReport
from stowplan.runtime.pipeline.pipeline import Pipeline
from stowplan.runtime.pipeline.reporting import report_of
from stowplan.runtime.pipeline.stage_costs import Subject, probe
from stowplan.runtime.snapshot.memory.region import mapped_bytes
from stowplan.runtime.snapshot.reservation import SnapshotMemory
from stowplan.session.applying import AppliedPlan
from stowplan.session.making import Size
from stowplan.session.planning import plan, replan
from stowplan.session.snapshots import snapshot_size

__all__ = ["AppliedPipelinePlan", "PipelinePlan", "plan_pipeline"]

_SHARES = (0.5, 0.2, 0.0)  # of what keeping everything takes above the least; menus begin with all of it
_ENOUGH = 1 << 60
_WIDTH = 100

_applied: weakref.WeakSet[Pipeline] = weakref.WeakSet()


@dataclass(frozen=True, eq=False)
class PipelinePlan:
    """What ``stowplan.plan`` gives for a pipeline: the same on all devices, but for ``plans``.

    Attributes:
        budget_bytes: of each device.
        timeline: the schedule, and what is predicted of it.
        origin: where the schedule is from.
        levels: of each stage: 0 keeps everything, each next one holds less.
        plans: the activation plans of this process's stages by number; None keeps everything.
        in_flight: the most microbatches that each of them holds at once.
        trials: what was tried.
        kept: of each stage, the bytes that a microbatch leaves on each level of its menu.
        snapshot_bytes: what snapshots take of each process's host budget.
    """

    budget_bytes: int
    timeline: Timeline
    origin: str
    levels: tuple[int, ...]
    plans: dict[int, Plan | None]
    in_flight: dict[int, int]
    trials: tuple[Trial, ...]
    kept: tuple[tuple[int, ...], ...]
    snapshot_bytes: int = 0

    @property
    def schedule(self) -> Schedule:
        return self.timeline.schedule

    @property
    def report(self) -> PipelineReport:
        """For reading and drawing."""
        return report_of(f"planned ({self.origin})", self.timeline, in_bytes=True, limit_bytes=self.budget_bytes)

    def render(self) -> str:
        """What was chosen, why, and what it gives; at most 100 columns."""
        lines = ["what a microbatch leaves on each stage:"]
        for stage, (level, sizes) in enumerate(zip(self.levels, self.kept, strict=True)):
            chosen = "everything kept" if level == 0 else f"{sizes[level] / sizes[0]:.0%} of what keeping takes"
            device = self.schedule.stage_devices[stage]
            lines.append(f"  stage {stage:>3} (device {device:>3}): {format_bytes(sizes[level]):>10}  {chosen}")
        lines += ["", "tried, by the level of the first and of the second half of the model (0: all kept):"]
        for trial in self.trials:
            lines.append(f"  {trial.levels[0]} {trial.levels[1]}: {self._told(trial)}")
        lines += ["", *wrap(self._why(), _WIDTH), ""]
        if self.snapshot_bytes:
            lines.append(f"Snapshots take {format_bytes(self.snapshot_bytes)} of the host for each device.")
        return self.report.render() + "\n" + "\n".join(lines)

    def _told(self, trial: Trial) -> str:
        if not trial.origin:
            return f"does not fit, needs {format_bytes(trial.peak_bytes)} at least"
        slower = trial.step_seconds / self.timeline.step_seconds - 1
        peak = format_bytes(trial.peak_bytes)
        return f"{trial.step_seconds:.4g} s ({slower:+.1%}), {peak}, schedule {trial.origin}"

    def _why(self) -> str:
        kept = next((trial for trial in self.trials if trial.levels == (0, 0)), None)
        if not any(self.levels):
            return "Everything is kept: nothing that holds less is faster within the budget."
        if kept is None:
            return "Keeping everything is not faster even where there is room for any schedule, as it was measured."
        if not kept.origin:
            return "Not everything can be kept within the budget, whatever the schedule."
        return (
            f"Keeping everything fits, but with so few microbatches in flight that a step takes "
            f"{kept.step_seconds / self.timeline.step_seconds:.3f} times as long."
        )


def plan_pipeline(
    pipeline: Pipeline,
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
) -> PipelinePlan:
    """Choose a schedule and the stages' activation plans for the least step time within ``budget`` on every device.

    All devices of the pipeline call it at once, with a batch as for ``Pipeline.step``. Nothing changes until
    ``stowplan.apply(plan, pipeline)``.

    Args:
        budget: device bytes of this process; the least of all devices counts. ``"auto"``: what is free, less 1 GiB.
        host_budget: host bytes of this process for swapped values and ``snapshots``. ``"auto"``: its share of four
            fifths of what is available, if all devices of the pipeline are on this machine.
        optimizer: of this process; its states count, what its step takes beside does not (activations are gone).
        solver, time_limit_seconds, exact, tolerance: as in ``stowplan.plan``, for each stage.
        snapshots: as in ``stowplan.plan``, of this process's stages; what the largest one's take is left to them.
        on_progress: called with a line of text as the work goes on.

    Raises:
        InfeasibleBudget: names the least budget that a schedule was found for.
        InvalidArgument: a size, batch or solver that cannot be used.
        UnsupportedModel: a stage cannot be captured.
    """
    say = on_progress if on_progress is not None else lambda message: None
    link = pipeline.link
    own = device_budget_bytes(pipeline.device) if budget == "auto" else parse_bytes(budget, "budget")
    host = host_budget_bytes() // link.size if host_budget == "auto" else parse_bytes(host_budget, "host_budget")
    limit_bytes = min(link.gathered(own))
    size = snapshot_size(snapshots, pipeline, optimizer, pipeline.device)
    taken = max(link.gathered(size.total_bytes if size else 0))
    if size is not None and host_budget == "auto":
        host += mapped_bytes()
    if min(link.gathered(host - taken)) < 0:
        advice = "Raise host_budget= to that, use more devices, or take no snapshots."
        raise InfeasibleBudget(limit_bytes, limit_bytes, min(link.gathered(host)), advice, taken, taken)
    most_in_flight = min(pipeline.num_microbatches, 2 * pipeline.size)
    options = {"solver": solver, "time_limit_seconds": time_limit_seconds, "exact": exact, "tolerance": tolerance}
    subjects = pipeline.subjects(batch)
    menus: dict[int, list[Plan | None]] = {}
    host_each = max(1, (host - taken) // (len(subjects) * most_in_flight))  # each stage, each microbatch in flight
    for number, subject in subjects.items():
        say(f"planning stage {number} of {pipeline.schedule.num_stages}")
        menus[number] = [None, *link.together(partial(_plans, subject, host_each, options))]
    say("measuring each stage under each of its plans")
    costs = link.together(
        lambda: {number: _priced(subjects[number], menu) for number, menu in menus.items()}, in_turns=True
    )
    columns = pipeline.of_all_stages(costs, optimizer)
    say("looking for schedules")
    seconds = pipeline.communication_seconds()
    choice: Choice | InfeasibleSchedule | None = None
    if link.rank == 0:
        try:
            choice = choose(
                columns,
                pipeline.schedule.stage_devices,
                pipeline.num_microbatches,
                limit_bytes,
                splits_backward=pipeline.schedule.splits_backward,
                communication_seconds=seconds,
            )
        except InfeasibleSchedule as error:
            choice = error
    choice = link.told(choice)
    if isinstance(choice, InfeasibleSchedule):
        raise InfeasibleBudget(
            limit_bytes,
            choice.least_bytes,
            host,
            "That takes one microbatch at a time. Raise budget= to that, make microbatches smaller, or use more "
            "devices.",
            taken,
        )
    assert choice is not None
    return PipelinePlan(
        budget_bytes=limit_bytes,
        timeline=choice.timeline,
        origin=choice.origin,
        levels=choice.levels,
        plans={number: menu[choice.levels[number]] for number, menu in menus.items()},
        in_flight={number: _in_flight(choice.schedule, number) for number in menus},
        trials=choice.trials,
        kept=tuple(tuple(cost.forward_bytes for cost in column) for column in columns),
        snapshot_bytes=taken,
    )


def _plans(subject: Subject, host_bytes: int, options: dict[str, Any]) -> list[Plan]:
    """Plans of one stage, each of which holds less than the one before."""
    hidden = subject.hidden()
    with subject.deferred.resumed(), subject.deferred.at_once():
        roomy = plan(
            subject.stage,
            (hidden if hidden is None else hidden.requires_grad_(), subject.inputs),
            budget=_ENOUGH,
            host_budget=host_bytes,
            blocks=subject.stage.layers,
            loss_fn=lambda output, _: output if output.ndim == 0 else output.sum(),
            **options,
        )
    least, most = roomy.least_budget_bytes, roomy.unplanned.peak_bytes
    made: list[Plan] = []
    for share in _SHARES:
        less = replan(roomy, budget=least + int(share * (most - least)), solver=options["solver"])
        if less.decisions != (made[-1] if made else roomy).decisions:
            made.append(less)
    return made


def _priced(subject: Subject, menu: Sequence[Plan | None]) -> list[StageCosts]:
    """The costs of a stage under each plan of its menu."""
    costs = []
    for plan_of_stage in menu:
        if plan_of_stage is None:
            costs.append(probe(subject))
        else:
            with AppliedPlan(plan_of_stage, subject.stage, verify="off"):
                costs.append(probe(subject))
    return costs


def _in_flight(schedule: Schedule, stage: int) -> int:
    """The most microbatches of ``stage`` between their F and the end of their backward pass."""
    held = most = 0
    for action in schedule.orders[schedule.stage_devices[stage]]:
        if action.stage == stage:
            held += (action.kind is Kind.FORWARD) - (action.kind in (Kind.INPUT_GRADIENT, Kind.BACKWARD))
            most = max(most, held)
    return most


class AppliedPipelinePlan:
    """A pipeline's plan in force: a handle (``remove``) and a context manager.

    Attributes:
        stages: the handles of this process's stages by number.
    """

    def __init__(self, plan: PipelinePlan, pipeline: Pipeline, *, verify: str = "sample", strict: bool = False) -> None:
        if pipeline in _applied:
            raise InvalidArgument("a plan is applied to this pipeline already; call remove() on its handle first.")
        self.plan = plan
        self._pipeline, self._before = pipeline, pipeline.schedule
        self.stages: dict[int, AppliedPlan] = {}
        pipeline.use(plan.schedule)
        _applied.add(pipeline)
        try:
            pipeline.link.together(partial(self._apply, verify, strict))
        except BaseException:
            self.remove()
            raise

    def _apply(self, verify: str, strict: bool) -> None:
        plan, pipeline = self.plan, self._pipeline
        for number, plan_of_stage in plan.plans.items():
            if plan_of_stage is not None:
                self.stages[number] = AppliedPlan(
                    plan_of_stage,
                    pipeline.stages[number],
                    verify=verify,
                    strict=strict,
                    budget_bytes=plan.budget_bytes,
                    in_flight=plan.in_flight[number],
                )

    def remove(self) -> None:
        """Take the activation plans away, and the schedule back that was there before; on all devices, none waits for
        another. Removing twice does nothing.
        """
        for handle in self.stages.values():
            handle.remove()
        self.stages.clear()
        if self._pipeline in _applied:
            _applied.remove(self._pipeline)
            self._pipeline.use(self._before)

    def __enter__(self) -> AppliedPipelinePlan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()
