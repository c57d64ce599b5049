"""plan, apply, wrap, measure, report: where capture, planner, engine and reports meet."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import torch

from stowplan.core.errors import InvalidArgument, PlanMismatch, UnsupportedModel
from stowplan.core.hardware import Hardware, preset
from stowplan.core.plan import Plan
from stowplan.core.program import Action
from stowplan.core.units import format_bytes, parse_bytes
from stowplan.offload.arguments import flatten_named, tensors_in
from stowplan.offload.blocks import Block, Blocks, find_blocks, refuse_unsupported
from stowplan.offload.calibrate import RESERVE_BYTES, device_budget_bytes, host_budget_bytes, measure_hardware
from stowplan.offload.capture import capture
from stowplan.offload.copies import PlainCopies
from stowplan.offload.engine import Engine
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.intercept import Forward, Interception
from stowplan.offload.measure import Meter
from stowplan.offload.tape.run import Counters
from stowplan.reports import text

__all__ = ["AppliedPlan", "Meter", "applied", "apply", "measure", "plan", "replan", "report", "wrap"]

Model = TypeVar("Model", bound=torch.nn.Module)
Size = int | str
LossFunction = Callable[[Any, Any], Any]

# On errors of the user's own model, so that who shows them can tell them from ours.
FORWARD_NOTE = "raised by the model's forward on the batch that was given to stowplan.plan"
# Room for the 64-byte alignment of each swapped value in the host slab.
_SLAB_ALIGNMENT = 64

_applied: weakref.WeakKeyDictionary[torch.nn.Module, AppliedPlan] = weakref.WeakKeyDictionary()


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
    on_progress: Callable[[str], None] | None = None,
) -> Plan:
    """Decide what each block of ``model`` keeps, swaps and recomputes, for the least step time within the budgets.

    Runs one block of each kind and the model around it on ``batch``; parameters, gradients, optimizer states, buffers
    and random generators are afterwards as before. Call it under ``torch.autocast`` if the forward pass runs so.

    Args:
        batch: what the model is called with: a dict (keyword arguments), a tuple or list (positional), or one tensor.
        budget: device bytes this process may use, as an int or ``"60GiB"``; ``"auto"``: what is free, less 1 GiB.
        host_budget: host bytes for swapped values; ``"auto"``: four fifths of what is available.
        optimizer: its states and its step count towards the budget.
        loss_fn: ``loss_fn(output, batch)`` gives the loss; default: the output's ``loss``, or a scalar output.
        hardware: a description or a preset's name, to plan with other link speeds; default: measured here.
        blocks: the blocks' container by dotted name, or the modules; default: the largest stack of like modules.
        solver: a PuLP solver by name.
        time_limit_seconds: for solving; capture comes on top.
        hold_gradients: gradients stay allocated between steps (accumulation, ``zero_grad(set_to_none=False)``).
        hold_output: the loop holds the model's output (its logits) until backward is over, as after
            ``output = model(batch)``; False for loops that keep the loss alone.
        on_progress: called with a line of text as the work goes on.

    Raises:
        InfeasibleBudget: names the least feasible budget.
        InvalidArgument: a size, batch, hardware or solver that cannot be used.
        UnsupportedModel: the model cannot be captured as it is; says what to change.
    """
    run = _Batch(model, batch, loss_fn)
    return _plan(
        model,
        run.forward,
        run.loss_of,
        batch,
        budget=budget,
        host_budget=host_budget,
        optimizer=optimizer,
        hardware=hardware,
        blocks=blocks,
        solver=solver,
        time_limit_seconds=time_limit_seconds,
        hold_gradients=hold_gradients,
        hold_output=hold_output,
        on_progress=on_progress if on_progress is not None else lambda message: None,
    )


def _plan(
    model: torch.nn.Module,
    forward: Callable[[], Any],
    loss_of: Callable[[Any], torch.Tensor],
    batch: Any,
    *,
    budget: Size,
    host_budget: Size,
    optimizer: torch.optim.Optimizer | None,
    hardware: Hardware | str | None,
    blocks: Blocks,
    solver: str,
    time_limit_seconds: float,
    hold_gradients: bool,
    hold_output: bool,
    on_progress: Callable[[str], None],
) -> Plan:
    from stowplan.planner.activations import solve

    device = _device_of(model)
    device_bytes = device_budget_bytes(device) if budget == "auto" else parse_bytes(budget, "budget")
    host_bytes = host_budget_bytes() if host_budget == "auto" else parse_bytes(host_budget, "host_budget")
    on_progress("measuring the machine")
    machine = _hardware(hardware, device)
    found = find_blocks(model, blocks)
    captured = capture(
        model,
        found,
        forward,
        loss_of,
        optimizer=optimizer,
        batch=batch,
        hold_gradients=hold_gradients,
        hold_output=hold_output,
        on_progress=on_progress,
    )
    on_progress("solving")
    answer = solve(
        captured.step,
        machine,
        device_bytes,
        host_bytes,
        solver=solver,
        time_limit_seconds=time_limit_seconds,
        on_progress=on_progress,
    )
    reserve = (f"of the free memory {format_bytes(RESERVE_BYTES)} are left alone",) if budget == "auto" else ()
    return Plan(
        model=type(model).__name__,
        batch=_describe(batch),
        budget_bytes=device_bytes,
        host_budget_bytes=host_bytes,
        hardware=machine,
        step=captured.step,
        decisions=answer.decisions,
        prediction=answer.prediction,
        unplanned=answer.unplanned,
        solution=answer.solution,
        least_budget_bytes=answer.least_budget_bytes,
        baselines=answer.baselines,
        declined=answer.declined,
        assumptions=(*captured.assumptions, *_standing_assumptions(device), *reserve),
        versions=_versions(),
    )


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

    ``host_budget`` defaults to the plan's own. Raises as ``plan`` does.
    """
    from stowplan.planner.activations import solve

    device_bytes = parse_bytes(budget, "budget")
    host_bytes = plan.host_budget_bytes if host_budget is None else parse_bytes(host_budget, "host_budget")
    answer = solve(
        plan.step,
        plan.hardware,
        device_bytes,
        host_bytes,
        solver=solver,
        time_limit_seconds=time_limit_seconds,
        on_progress=on_progress,
    )
    return replace(
        plan,
        budget_bytes=device_bytes,
        host_budget_bytes=host_bytes,
        decisions=answer.decisions,
        prediction=answer.prediction,
        unplanned=answer.unplanned,
        solution=answer.solution,
        least_budget_bytes=answer.least_budget_bytes,
        baselines=answer.baselines,
        declined=answer.declined,
        measurement=None,
    )


def _standing_assumptions(device: torch.device) -> Iterator[str]:
    yield "bytes are those of live tensors and kernels' scratch; the allocator's fragmentation comes on top"
    yield "copies to and from the host stop compute: they are not overlapped yet"
    if device.type == "cpu":
        yield "the CPU stands in for a device: host bytes are taken from the system beside its allocator"


class _Batch:
    """Calls a model on a batch and finds the loss."""

    def __init__(self, model: torch.nn.Module, batch: Any, loss_fn: LossFunction | None) -> None:
        self.model = model
        self.batch = batch
        self.loss_fn = loss_fn
        if not isinstance(batch, Mapping | tuple | list | torch.Tensor):
            raise InvalidArgument(
                f"batch is a {type(batch).__name__}; allowed: a dict of keyword arguments, a tuple or list of "
                f"positional ones, or one tensor."
            )

    def forward(self) -> Any:
        try:
            if isinstance(self.batch, Mapping):
                return self.model(**self.batch)
            if isinstance(self.batch, torch.Tensor):
                return self.model(self.batch)
            return self.model(*self.batch)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            error.add_note(FORWARD_NOTE)
            raise

    def loss_of(self, output: Any) -> torch.Tensor:
        """The scalar to differentiate. Raises InvalidArgument where there is none."""
        loss: Any = self.loss_fn(output, self.batch) if self.loss_fn is not None else _own_loss(output)
        if loss is None:
            raise InvalidArgument(
                f"the model's output ({type(output).__name__}) has no loss to differentiate; give loss_fn=, a function "
                f"of (output, batch), or put labels into the batch."
            )
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise InvalidArgument("the loss is not a tensor of one element with a gradient; loss_fn= must return one.")
        return loss


def _own_loss(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output if output.numel() == 1 else None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) else None


def _hardware(hardware: Hardware | str | None, device: torch.device) -> Hardware:
    if hardware is None:
        return measure_hardware(device)
    machine = preset(hardware) if isinstance(hardware, str) else hardware
    if machine.device_type != device.type:
        raise InvalidArgument(
            f"hardware={machine.name!r} is a {machine.device_type} device, but the model is on {device}: seconds and "
            f"bytes are measured where the model is. Move the model there, or leave hardware= out."
        )
    return machine


def _device_of(model: torch.nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise UnsupportedModel(
            f"the model's parameters are on {len(devices)} devices ({', '.join(sorted(map(str, devices))) or 'none'}); "
            f"stowplan plans for one device a process."
        )
    (device,) = devices
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedModel(f"the model is on {device}; stowplan plans for cpu and cuda.")
    return device


def _describe(batch: Any) -> str:
    arguments = (batch,) if isinstance(batch, torch.Tensor) else batch
    items = arguments.items() if isinstance(arguments, Mapping) else enumerate(arguments)
    shapes = [
        f"{name} {'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"
        for name, item in items
        for tensor in tensors_in(item)
    ]
    return ", ".join(shapes)


def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for package in ("stowplan", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append((package, importlib.metadata.version(package)))
    return tuple(found)


# ---- apply ---------------------------------------------------------------------------------------------------------
class AppliedPlan:
    """A plan in force on a model: a handle (``remove``) and a context manager.

    ``counters`` tells what was swapped and recomputed so far.
    """

    def __init__(self, plan: Plan, model: torch.nn.Module) -> None:
        device = _device_of(model)
        if plan.hardware.device_type != device.type:
            raise PlanMismatch(
                f"the plan was made for {plan.hardware.device_type} ({plan.hardware.name}), but the model is on "
                f"{device}. Move the model there, or plan anew."
            )
        if model in _applied:
            raise InvalidArgument("a plan is applied to this model already; call remove() on its handle first.")
        self.plan = plan
        self.counters = Counters()
        self._model = weakref.ref(model)
        self.resume()

    def resume(self) -> None:
        """Put the hooks on the blocks."""
        model = self._model()
        assert model is not None
        copies = PlainCopies(_slab(self.plan, model))
        self.engine = Engine(model, _named_blocks(model, self.plan), _decisions(self.plan), copies, self.counters)
        _applied[model] = self

    def suspend(self) -> bool:
        """Take the hooks off the blocks. False if another plan is in force by now, or none."""
        self.engine.remove()
        model = self._model()
        if model is None or _applied.get(model) is not self:
            return False
        del _applied[model]
        return True

    def remove(self) -> None:
        """Take all hooks away, ``wrap``'s too; the model is as it was. Removing twice, or a plan that another one has
        replaced, does nothing.
        """
        model = self._model()
        if self.suspend() and model is not None:
            wrapper = _wrapper_of(model)
            if wrapper is not None:
                wrapper.interception.remove()

    def __enter__(self) -> AppliedPlan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def apply(plan: Plan, model: torch.nn.Module) -> AppliedPlan:
    """Carry ``plan`` out on ``model`` from now on: hooks only, the module tree and state dict stay as they are.

    The first call of every block with a decision is recorded and its replay proved against the true values.

    Raises PlanMismatch if the model is not the one the plan was made for (here, or at a block's first call), and
    InvalidArgument if a plan is in force on it already.
    """
    return AppliedPlan(plan, model)


def _named_blocks(model: torch.nn.Module, plan: Plan) -> list[Block]:
    modules = dict(model.named_modules())
    missing = [name for name in plan.step.block_names if name not in modules]
    if missing:
        raise PlanMismatch(
            f"the plan was made for {plan.model} with blocks {plan.step.block_names[0]} … {plan.step.block_names[-1]}; "
            f"{type(model).__name__} has no {missing[0]}. Plan anew with this model."
        )
    blocks = [Block(name, modules[name]) for name in plan.step.block_names]
    for number, block in enumerate(blocks):
        planned = plan.step.program_of(number).name
        if type(block.module).__name__ != planned:
            raise PlanMismatch(
                f"{block.name} is a {type(block.module).__name__}, but the plan was made for a {planned}. Plan anew."
            )
    return blocks


def _decisions(plan: Plan) -> Sequence[Mapping[str, Action]]:
    return [plan.actions_of(block) for block in range(plan.step.num_blocks)]


def _slab(plan: Plan, model: torch.nn.Module) -> HostSlab:
    num_swapped = sum(action is Action.SWAP for actions in plan.decisions for action in actions)
    size_bytes = plan.prediction.host_bytes + num_swapped * _SLAB_ALIGNMENT
    return HostSlab(size_bytes, pinned=_device_of(model).type == "cuda")


# ---- wrap ----------------------------------------------------------------------------------------------------------
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
) -> Model:
    """Plan at the first batch and carry the plan out from then on; gives the same model back.

    The first training forward (and the first one with a larger batch than planned for) plans as ``plan`` does, with
    that call's arguments as the batch, then goes on under the plan. Without a loss in the model's output, and without
    ``loss_fn``, the head is captured with the sum of the output as its loss, which is said in the plan's assumptions.

    The plan in force is ``stowplan.applied(model).plan``; ``stowplan.applied(model).remove()`` takes everything away.

    Raises InvalidArgument or UnsupportedModel at once for sizes and blocks that cannot be, the rest of what ``plan``
    raises at the forward that plans.
    """
    for size, name in ((budget, "budget"), (host_budget, "host_budget")):
        if size != "auto":
            parse_bytes(size, name)
    if model in _applied or _wrapper_of(model) is not None:
        raise InvalidArgument("the model is wrapped, or has a plan applied to it, already; take that away first.")
    refuse_unsupported(model, find_blocks(model, blocks))
    options = {"budget": budget, "host_budget": host_budget, "optimizer": optimizer, "blocks": blocks}
    _Wrapper(model, loss_fn, {**options, "hold_gradients": hold_gradients, "hold_output": hold_output})
    return model


class _Wrapper:
    """Plans at a model's first training forward, and again when batches grow."""

    def __init__(self, model: torch.nn.Module, loss_fn: LossFunction | None, options: dict[str, Any]) -> None:
        self.loss_fn = loss_fn
        self.options = options
        self.largest: dict[str, tuple[int, ...]] = {}  # shape of each tensor argument that was planned for
        self.busy = False
        self.interception = Interception(model, self.call)

    def call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.busy or not (torch.is_grad_enabled() and self.interception.module.training):
            return forward(*args, **kwargs)
        shapes = {name: tuple(leaf.shape) for name, leaf in flatten_named(forward, args, kwargs) if _is_tensor(leaf)}
        if any(_exceeds(shape, self.largest.get(name)) for name, shape in shapes.items()):
            self.busy = True
            try:
                self._plan(forward, args, kwargs)
            finally:
                self.busy = False
            self.largest = {name: _envelope(shape, self.largest.get(name)) for name, shape in shapes.items()}
        return forward(*args, **kwargs)

    def _plan(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan for this call and put the plan in force; if there is none, the one before stays in force."""
        model = self.interception.module
        before = _applied.get(model)
        if before is not None:
            before.suspend()
        try:
            made = self._made(model, forward, args, kwargs)
        except BaseException:
            if before is not None:
                before.resume()
            raise
        AppliedPlan(made, model)

    def _made(self, model: torch.nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        batch = {**{str(i): argument for i, argument in enumerate(args)}, **kwargs}
        run = _Batch(model, batch, self.loss_fn)
        outside: list[str] = []

        def loss_of(output: Any) -> torch.Tensor:
            differentiable = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
            if self.loss_fn is not None or _own_loss(output) is not None or not differentiable:
                return run.loss_of(output)
            outside[:] = ["the loss is computed outside the model and not counted: give loss_fn= to count it"]
            return torch.stack([tensor.sum() for tensor in differentiable]).sum()

        made = _plan(
            model,
            lambda: forward(*args, **kwargs),
            loss_of,
            batch,
            hardware=None,
            solver="HiGHS",
            time_limit_seconds=5.0,
            on_progress=lambda message: None,
            **self.options,
        )
        for said in outside:
            warnings.warn(f"stowplan.wrap: {said}.", RuntimeWarning, stacklevel=2)
        return replace(made, assumptions=(*made.assumptions, *outside))


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _exceeds(shape: tuple[int, ...], planned: tuple[int, ...] | None) -> bool:
    return planned is None or len(planned) != len(shape) or any(a > b for a, b in zip(shape, planned, strict=True))


def _envelope(shape: tuple[int, ...], planned: tuple[int, ...] | None) -> tuple[int, ...]:
    if planned is None or len(planned) != len(shape):
        return shape
    return tuple(map(max, shape, planned))


def _wrapper_of(model: torch.nn.Module) -> _Wrapper | None:
    """The wrapper in front of the model's forward. It is found there and kept nowhere else, so that it goes with it."""
    forward = model.__dict__.get("forward")
    handler = forward.handler if isinstance(forward, Interception) else None
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, _Wrapper) else None


def applied(model: torch.nn.Module) -> AppliedPlan | None:
    """The plan in force on ``model``, by ``apply`` or ``wrap``; None where there is none (yet)."""
    return _applied.get(model)


# ---- measure, report -----------------------------------------------------------------------------------------------
def measure(model: torch.nn.Module) -> Meter:
    """A context around a few training steps; afterwards ``.measurement`` has peaks, seconds and bytes moved, per step.

    The highest live bytes come from torch's own allocator events (CPU) or counters (CUDA).
    """
    handle = _applied.get(model)
    return Meter(model, handle.counters if handle is not None else Counters())


def report(plan: Plan) -> str:
    """The plan as text, 100 columns: what fits, what it gains, where memory goes, what every block does."""
    return text.render(plan)
