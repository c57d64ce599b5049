"""Plans that make themselves at the first batch."""

from __future__ import annotations

import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from stowplan.core.errors import InfeasibleBudget, InvalidArgument, InvalidSize
from stowplan.core.plan import Plan
from stowplan.core.units import format_bytes, parse_bytes
from stowplan.offload.arguments import tensors_in
from stowplan.offload.blocks import Blocks, find_blocks, refuse_unsupported
from stowplan.offload.calibrate import measure_hardware
from stowplan.offload.intercept import Forward, Interception
from stowplan.offload.parallel import inner_model, is_sharded
from stowplan.offload.tape.checks import Verify
from stowplan.runtime.snapshot.reservation import SnapshotMemory
from stowplan.session.applying import AppliedPlan, applied
from stowplan.session.batches import exceeds, shapes_of_call
from stowplan.session.making import (
    Batch,
    LossFunction,
    Options,
    Size,
    budgets_here,
    device_of,
    make_plan,
    own_loss,
)
from stowplan.session.planning import replan
from stowplan.session.watching import Excess

__all__ = ["wrap"]

Model = TypeVar("Model", bound=torch.nn.Module)

# What is before a model's forward, which holds it: this table must hold neither.
_wrappers: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[_Wrapper]] = weakref.WeakKeyDictionary()


def wrap(
    model: Model,
    *,
    budget: Size = "auto",
    host_budget: Size = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFunction | None = None,
    blocks: Blocks = None,
    hold_gradients: bool = False,
    hold_output: bool = True,
    chunked_head: bool | None = None,
    exact: bool = True,
    tolerance: float | None = None,
    snapshots: SnapshotMemory | None = None,
    verify: str = "sample",
    strict: bool = False,
) -> Model:
    """Plan at the first batch and carry the plan out from then on; gives the same model back.

    The first training forward (and the first one with a larger batch than planned for) plans as ``plan`` does, with
    that call's arguments as the batch, then goes on under the plan. Without a loss in the model's output, and without
    ``loss_fn``, the head is captured with the sum of the output as its loss, which is said in the plan's assumptions.

    Where a step takes more than the budget, or an allocation fails, the next forward plans anew for a smaller one, with
    a warning, from what was captured: less by the excess, or nine tenths of what was predicted. Steps are seen on CUDA;
    on the CPU those that ``measure`` sees. With ``strict`` neither this nor a larger batch is planned for: PlanMismatch
    for the batch, BudgetExceeded for the step. ``verify`` is as in ``apply``, all else as in ``plan``.

    The plan in force is ``stowplan.applied(model).plan``; ``stowplan.applied(model).remove()`` takes everything away.

    Raises InvalidArgument or UnsupportedModel at once for sizes and blocks that cannot be, the rest of what ``plan``
    raises at the forward that plans.
    """
    Verify.of(verify)
    for size, name in ((budget, "budget"), (host_budget, "host_budget")):
        if size != "auto":
            parse_bytes(size, name)
    inner = inner_model(model)
    if applied(inner) is not None or _wrapper_of(inner) is not None:
        raise InvalidArgument("the model is wrapped, or has a plan applied to it, already; take that away first.")
    refuse_unsupported(inner, find_blocks(inner, blocks))
    options = Options(
        budget,
        host_budget,
        optimizer,
        blocks,
        hold_gradients=hold_gradients,
        hold_output=hold_output,
        chunked_head=chunked_head,
        exact=exact,
        tolerance=tolerance,
        snapshots=snapshots,
    )
    _ = options.rounding  # a mistake is told at once
    wrapper = _Wrapper(inner, loss_fn, options.around(model), verify, strict)
    _wrappers[inner] = weakref.ref(wrapper)
    return model


class _Wrapper:
    """Plans at a model's first training forward, again when batches grow, and for less when steps take more."""

    def __init__(
        self, model: torch.nn.Module, loss_fn: LossFunction | None, options: Options, verify: str, strict: bool
    ) -> None:
        self.loss_fn = loss_fn
        self.verify = verify
        self.strict = strict
        self.excess_bytes = 0  # taken off the budget so far
        self.options = options
        self.largest: dict[str, tuple[int, ...]] = {}  # shape of each tensor argument that was planned for
        self.busy = False
        self.interception = Interception(model, self.call)
        # Hooks gather the model's own parameters before its forward is called; planning must come before that.
        self.ahead = (
            model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True) if is_sharded(model) else None
        )

    def remove(self) -> None:
        """Take the wrapper away from the model."""
        self.interception.remove()
        if self.ahead is not None:
            self.ahead.remove()

    def _before(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._has_to_look():
            self._look(self.interception.forward, model, args, kwargs)

    def _has_to_look(self) -> bool:
        return not self.busy and torch.is_grad_enabled() and self.interception.module.training

    def call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._has_to_look():
            return forward(*args, **kwargs)
        if self.ahead is None:
            self._look(forward, forward, args, kwargs)
        handle = applied(self.interception.module)
        with handle.watch.failures_noted() if handle is not None else nullcontext():
            return forward(*args, **kwargs)

    def _look(self, forward: Forward, run: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Judge the steps before, and plan if this batch asks for it; ``run`` calls the model."""
        handle = applied(self.interception.module)
        if handle is not None:
            self._judge(handle, forward, args, kwargs)
        shapes = shapes_of_call(forward, args, kwargs)
        grown = any(exceeds(shape, self.largest.get(name)) for name, shape in shapes.items())
        if grown and handle is not None and any(map(is_sharded, self.interception.module.modules())):
            handle.watch.batch(forward, args, kwargs)  # other processes may have no larger batch, and would not plan
        elif grown:
            self.busy = True
            try:
                self._plan(run, args, kwargs)
            finally:
                self.busy = False
            self.largest = {name: _envelope(shape, self.largest.get(name)) for name, shape in shapes.items()}

    def _judge(self, handle: AppliedPlan, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what the steps before took."""
        if self.strict:
            handle.watch.judge()
            handle.watch.batch(forward, args, kwargs)
            return
        excess = handle.watch.excess()
        if excess is not None:
            self._plan_for_less(handle, excess)

    def _plan_for_less(self, handle: AppliedPlan, excess: Excess) -> None:
        """Put a plan for a smaller budget in force, from the same capture; if there is none, go on as before."""
        plan = handle.plan
        if excess.measured_bytes is not None:
            budget_bytes = plan.budget_bytes - (excess.measured_bytes - excess.budget_bytes)
        else:
            least_bytes = min(plan.least_budget_bytes, plan.needed_bytes)
            budget_bytes = max(least_bytes, min(plan.budget_bytes, plan.needed_bytes) * 9 // 10)
        try:
            corrected = _corrected(plan, budget_bytes, f"{excess}: planned for {format_bytes(budget_bytes)} instead")
        except (InfeasibleBudget, InvalidSize):
            warnings.warn(
                f"stowplan.wrap: {excess}; no plan takes so much less (least budget "
                f"{format_bytes(plan.least_budget_bytes)}), so it stays. Shorten the batch, or raise host_budget=.",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        warnings.warn(
            f"stowplan.wrap: {excess}; planned anew for {format_bytes(budget_bytes)}.", RuntimeWarning, stacklevel=2
        )
        self.excess_bytes += plan.budget_bytes - budget_bytes
        handle.suspend()
        self._apply(corrected, handle.watch.budget_bytes)

    def _apply(self, plan: Plan, budget_bytes: int) -> None:
        AppliedPlan(
            plan,
            self.interception.module,
            verify=self.verify,
            strict=self.strict,
            budget_bytes=budget_bytes,
            on_remove=_unwrap,
        )

    def _plan(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan for this call and put the plan in force; if there is none, the one before stays in force."""
        model = self.interception.module
        if self.ahead is None and is_sharded(model):
            raise InvalidArgument("fully_shard was called on the model after stowplan.wrap: call it before.")
        before = applied(model)
        if before is not None:
            before.suspend()
        try:
            made = self._made(model, forward, args, kwargs)
        except BaseException:
            if before is not None:
                before.resume()
            raise
        self._apply(made, made.budget_bytes + self.excess_bytes)

    def _made(self, model: torch.nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        batch = {**{str(i): argument for i, argument in enumerate(args)}, **kwargs}
        run = Batch(model, batch, self.loss_fn)
        outside: list[str] = []

        def loss_of(output: Any) -> torch.Tensor:
            differentiable = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
            if self.loss_fn is not None or own_loss(output) is not None or not differentiable:
                return run.loss_of(output)
            outside[:] = ["the loss is computed outside the model and not counted: give loss_fn= to count it"]
            return torch.stack([tensor.sum() for tensor in differentiable]).sum()

        device = device_of(model)
        budgets, machine = budgets_here(self.options, model, device), measure_hardware(device)
        run_forward = partial(forward, *args, **kwargs)
        made = make_plan(model, run_forward, loss_of, batch, machine, budgets, self.options)
        for said in outside:
            warnings.warn(f"stowplan.wrap: {said}.", RuntimeWarning, stacklevel=2)
        made = replace(made, assumptions=(*made.assumptions, *outside))
        if not self.excess_bytes:
            return made
        budget_bytes = made.budget_bytes - self.excess_bytes
        return _corrected(made, budget_bytes, f"{format_bytes(self.excess_bytes)} less, as plans before took more")


def _corrected(plan: Plan, budget_bytes: int, reason: str) -> Plan:
    """The plan for another budget, with the reason among its assumptions."""
    made = replan(plan, budget=budget_bytes)
    return replace(made, assumptions=(*made.assumptions, reason))


def _envelope(shape: tuple[int, ...], planned: tuple[int, ...] | None) -> tuple[int, ...]:
    if planned is None or len(planned) != len(shape):
        return shape
    return tuple(map(max, shape, planned))


def _unwrap(model: torch.nn.Module) -> None:
    wrapper = _wrapper_of(model)
    if wrapper is not None:
        wrapper.remove()
        del _wrappers[model]


def _wrapper_of(model: torch.nn.Module) -> _Wrapper | None:
    found = _wrappers.get(model)
    return None if found is None else found()
