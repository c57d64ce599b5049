"""From a model and a batch, real or fake, to a plan: capture, then the planner."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from stowplan.core.errors import InvalidArgument, UnsupportedModel
from stowplan.core.hardware import Hardware
from stowplan.core.plan import Plan, SnapshotBytes, tolerance_fault
from stowplan.core.units import format_bytes, parse_bytes
from stowplan.offload.blocks import Blocks, find_blocks
from stowplan.offload.calibrate import RESERVE_BYTES, device_budget_bytes, host_budget_bytes
from stowplan.offload.capture.instruments import Instruments, RealInstruments
from stowplan.offload.capture.step import capture
from stowplan.offload.parallel import bucket_bytes, class_name, keeps_gradients
from stowplan.offload.tape.proof import DEFAULT_TOLERANCES, Tolerance
from stowplan.runtime.snapshot.reservation import SnapshotMemory
from stowplan.session.batches import describe
from stowplan.session.heads import plan_head
from stowplan.session.snapshots import NO_OPTIMIZER, counting_snapshots, free_for_snapshots, of_one_rank, snapshot_size
from stowplan.session.solving import Solver

__all__ = [
    "FORWARD_NOTE",
    "FRAGMENTATION",
    "RESERVED",
    "Batch",
    "Budgets",
    "LossFunction",
    "Options",
    "Size",
    "budgets_here",
    "device_of",
    "make_plan",
    "own_loss",
]

Size = int | str
LossFunction = Callable[[Any, Any], Any]

# An assumption of plans for a budget of "auto".
RESERVED = f"of the free memory {format_bytes(RESERVE_BYTES)} are left alone"

# What an allocator without planned addresses may lose between buffers, as a share of the bytes that do not live all
# step. On the CPU the system gives memory by pages, and promises are about the allocator's bytes. For CUDA it is a
# guess.
FRAGMENTATION = {"cpu": 0.0, "cuda": 0.05}

# On errors of the user's own model, so that who shows them can tell them from ours.
FORWARD_NOTE = "raised by the model's forward on the batch that was given to stowplan.plan"


class Options(NamedTuple):
    """What ``plan`` was asked for beside the model and the machine; ``bucket_bytes`` are what DDP holds beside it."""

    budget: Size = "auto"
    host_budget: Size = "auto"
    optimizer: torch.optim.Optimizer | None = None
    blocks: Blocks = None
    solver: str = "HiGHS"
    time_limit_seconds: float = 5.0
    hold_gradients: bool = False
    hold_output: bool = True
    on_progress: Callable[[str], None] = lambda message: None
    chunked_head: bool | None = None
    exact: bool = True
    tolerance: float | None = None
    bucket_bytes: int = 0
    allocations: bool = False
    snapshots: SnapshotMemory | None = None

    def around(self, model: torch.nn.Module) -> Options:
        """The options for the model inside ``model``, with what the outer one takes by itself."""
        held = self.hold_gradients or keeps_gradients(model)
        return self._replace(hold_gradients=held, bucket_bytes=bucket_bytes(model))

    @property
    def rounding(self) -> Tolerance | None:
        """What rows that are recomputed alone may differ by; None: by no bit.

        Raises InvalidArgument for a tolerance that is no small positive number, or goes with an exact plan.
        """
        fault = tolerance_fault(self.exact, self.tolerance)
        if fault:
            raise InvalidArgument(f"tolerance={fault}.")
        return None if self.exact else Tolerance(self.tolerance)


class Budgets(NamedTuple):
    """Bytes of the device, and of the host for swapped values and for ``snapshots``, if any are taken."""

    device_bytes: int
    host_bytes: int
    snapshots: SnapshotBytes | None = None


def make_plan(
    model: torch.nn.Module,
    forward: Callable[[], Any],
    loss_of: Callable[[Any], torch.Tensor],
    batch: Any,
    machine: Hardware,
    budgets: Budgets,
    options: Options,
    instruments: Instruments | None = None,
) -> Plan:
    """``plan`` for callers that run the forward pass and find the loss themselves.

    Without ``instruments`` the model's device is measured.
    """
    device = device_of(model)
    device_bytes, host_bytes, snapshots = budgets
    blocks = find_blocks(model, options.blocks)
    captured = capture(
        model,
        blocks,
        forward,
        loss_of,
        optimizer=options.optimizer,
        batch=batch,
        instruments=instruments or RealInstruments(device, allocations=options.allocations),
        hold_gradients=options.hold_gradients,
        hold_output=options.hold_output,
        tolerance=options.rounding,
        on_progress=options.on_progress,
    )
    captured = captured.with_buffers(options.bucket_bytes)
    options.on_progress("solving")
    fragmentation = 0.0 if options.allocations else FRAGMENTATION[machine.device_type]
    solver = Solver(
        machine,
        device_bytes,
        host_bytes - (snapshots.total_bytes if snapshots else 0),
        options.solver,
        options.time_limit_seconds,
        options.on_progress,
        fragmentation,
    )
    dry = instruments is not None and instruments.dry
    with counting_snapshots(solver, captured.step, snapshots):
        chosen = plan_head(model, blocks, captured, solver, options.chunked_head, dry=dry)
    answer = chosen.answer
    rounding = _rounding(options.rounding) if options.rounding is not None else ()
    memory = _memory_assumptions(chosen.step.outside is not None, fragmentation)
    reserve: tuple[str, ...] = (RESERVED,) if options.budget == "auto" else ()
    if options.bucket_bytes:
        buckets = (
            f"DistributedDataParallel holds {format_bytes(options.bucket_bytes)} of buckets for gradients all the time"
        )
        reserve = (*reserve, buckets)
    if snapshots is not None and options.optimizer is None:
        reserve = (*reserve, NO_OPTIMIZER)
    return Plan(
        model=class_name(model),
        batch=describe(batch),
        budget_bytes=device_bytes,
        host_budget_bytes=host_bytes,
        hardware=machine,
        step=chosen.step,
        decisions=answer.decisions,
        prediction=answer.prediction,
        unplanned=chosen.unplanned,
        solution=answer.solution,
        least_budget_bytes=answer.least_budget_bytes,
        baselines=answer.baselines,
        declined=chosen.declined,
        assumptions=(
            *captured.assumptions,
            *chosen.said,
            *memory,
            *_standing_assumptions(device, machine),
            *rounding,
            *reserve,
        ),
        exact=options.exact,
        tolerance=options.tolerance,
        versions=_versions(),
        head=chosen.head,
        arena_bytes=None if chosen.step.outside is None else solver.arena_bytes(chosen.step, answer.decisions),
        fragmentation=fragmentation,
        snapshots=snapshots,
    )


def budgets_here(options: Options, model: torch.nn.Module, device: torch.device) -> Budgets:
    """Those of ``model`` on ``device``; ``"auto"`` asks the device and the host."""
    of_device = device_budget_bytes(device) if options.budget == "auto" else parse_bytes(options.budget, "budget")
    size = snapshot_size(options.snapshots, model, options.optimizer, device)
    if options.host_budget != "auto":
        return Budgets(of_device, parse_bytes(options.host_budget, "host_budget"), size)
    free = host_budget_bytes() + free_for_snapshots(options.snapshots)
    return Budgets(of_device, of_one_rank(free, options.snapshots, size), size)


def _memory_assumptions(addresses: bool, fragmentation: float) -> tuple[str, ...]:
    """What the step is said to take of the device, in words."""
    live = "bytes are those of live tensors and kernels' scratch"
    if addresses:
        return (f"{live}; what is needed is the highest address of an arena that follows the plan's addresses",)
    if fragmentation:
        return (f"{live}; for fragmentation {fragmentation:.0%} of those that do not live all step come on top",)
    return (f"{live}; the allocator's fragmentation comes on top",)


def _standing_assumptions(device: torch.device, machine: Hardware) -> Iterator[str]:
    if machine.overlapped_copies:
        yield "copies run beside compute at the rates of a copy alone, and do not slow it down"
    else:
        yield "copies to and from the host stop compute"
    if device.type == "cpu":
        yield "the CPU stands in for a device: host bytes are taken from the system beside its allocator"


def _rounding(tolerance: Tolerance) -> Iterator[str]:
    if tolerance.relative is not None:
        allowed = f"{tolerance.relative:g}"
    else:
        allowed = f"{DEFAULT_TOLERANCES[torch.float32]:g} (16-bit numbers: {DEFAULT_TOLERANCES[torch.bfloat16]:g})"
    yield (
        f"losses are not bitwise those of the plain run: rows that are recomputed alone may differ from those of the "
        f"whole by {allowed} of the value's largest number"
    )


class Batch:
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
        except Exception as error:
            error.add_note(FORWARD_NOTE)
            raise

    def loss_of(self, output: Any) -> torch.Tensor:
        """The scalar to differentiate. Raises InvalidArgument where there is none."""
        loss: Any = self.loss_fn(output, self.batch) if self.loss_fn is not None else own_loss(output)
        if loss is None:
            raise InvalidArgument(
                f"the model's output ({type(output).__name__}) has no loss to differentiate; give loss_fn=, a function "
                f"of (output, batch), or put labels into the batch."
            )
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise InvalidArgument("the loss is not a tensor of one element with a gradient; loss_fn= must return one.")
        return loss


def own_loss(output: Any) -> torch.Tensor | None:
    """The loss that a model's output brings along; None where there is none."""
    if isinstance(output, torch.Tensor):
        return output if output.numel() == 1 else None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) else None


def device_of(model: torch.nn.Module) -> torch.device:
    """The one device of the model's parameters. Raises UnsupportedModel for several, or for neither cpu nor cuda."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise UnsupportedModel(
            f"the model's parameters are on {len(devices)} devices ({', '.join(sorted(map(str, devices))) or 'none'}); "
            f"stowplan plans for one device a process."
        )
    (device,) = devices
    if device.type not in ("cpu", "cuda", "meta"):
        raise UnsupportedModel(f"the model is on {device}; stowplan plans for cpu and cuda.")
    return device


def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for package in ("stowplan", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append((package, importlib.metadata.version(package)))
    return tuple(found)
