"""Planning without running the model, for this machine or one that is not here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from stowplan.core.errors import InvalidArgument, UnsupportedModel
from stowplan.core.hardware import Hardware, preset
from stowplan.core.plan import Plan
from stowplan.core.units import parse_bytes
from stowplan.offload.calibrate import RESERVE_BYTES, measure_hardware
from stowplan.offload.dry import self_test
from stowplan.offload.dry.cuda import target_of
from stowplan.offload.dry.cuda_costs import assumptions, workspace_bytes
from stowplan.offload.dry.datasheet import Datasheet
from stowplan.offload.dry.mode import Costs
from stowplan.offload.dry.probes import Probes
from stowplan.offload.dry.run import DryRun, building
from stowplan.session.making import Batch, Budgets, LossFunction, Options, budgets_here, device_of, make_plan
from stowplan.session.snapshots import of_one_rank, snapshot_size

__all__ = ["dry", "plan_dry"]

_FAKE_TENSORS_FAIL = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
_UNPROVED = (
    "the model was not run: bytes and ops are those of fake tensors; that replays give the same bits is proved at each "
    "block's first call under the plan"
)


@contextmanager
def dry(hardware: Hardware | str | None = None) -> Iterator[None]:
    """Inside, new tensors take no memory: build a model, a batch and an optimizer in here, then plan for them.

        with stowplan.dry():
            model, batch = LlamaForCausalLM(config), {"input_ids": torch.zeros(1, 8192, dtype=torch.long)}
            optimizer = torch.optim.AdamW(model.parameters())
        plan = stowplan.plan(model, batch, optimizer=optimizer, hardware="h100-sxm")

    Tensors have a shape, a dtype and a device; small ones that depend on no weights (masks, positions) have their
    values too. Weights are not initialised. Such a model can be planned for, and nothing else.

    Args:
        hardware: of a machine with GPUs: tensors may be on cuda inside, and ``torch.autocast("cuda")`` holds, whatever
            is here.
    """
    machine = preset(hardware) if isinstance(hardware, str) else hardware
    with building(target_of(machine.name) if machine is not None and machine.device_type == "cuda" else None):
        yield


def _budgets_there(options: Options, model: torch.nn.Module, machine: Hardware) -> Budgets:
    """Those of ``model``; ``"auto"`` takes them from the description of a machine that is not here."""
    sizes = (("budget", options.budget, machine.device_bytes), ("host_budget", options.host_budget, machine.host_bytes))
    for name, asked, there in sizes:
        if asked == "auto" and there <= RESERVE_BYTES:
            raise InvalidArgument(
                f'{name}="auto", but {machine.name} is not known to have memory: say {name}= in bytes.'
            )
    of_device, of_host = (
        there - RESERVE_BYTES if asked == "auto" else parse_bytes(asked, name) for name, asked, there in sizes
    )
    size = snapshot_size(options.snapshots, model, options.optimizer, torch.device(machine.device_type))
    if options.host_budget == "auto":
        of_host = of_one_rank(of_host, options.snapshots, size)
    return Budgets(of_device, of_host, size)


def plan_dry(
    model: torch.nn.Module, batch: Any, loss_fn: LossFunction | None, machine: Hardware | None, options: Options
) -> Plan:
    """Plan by fake tensors, for ``machine`` or, without one, for the device that the model is on."""
    if machine is None:
        device = device_of(model)
        if device.type == "meta":
            device = torch.device("cpu")
        options.on_progress("measuring the machine")
        machine = measure_hardware(device)
        costs: Costs = Probes(device, machine)
        run = DryRun(model, batch, device, costs, real_device=device, allocations=options.allocations)
        budgets = budgets_here(options, model, device)
    else:
        device = torch.device(machine.device_type)
        target = target_of(machine.name) if device.type == "cuda" else None
        costs = Datasheet(machine, workspace_bytes) if target is not None else Datasheet(machine)
        if target is not None:
            costs.guesses |= dict.fromkeys(assumptions(target))
        run = DryRun(model, batch, device, costs, target=target, allocations=options.allocations)
        budgets = _budgets_there(options, model, machine)
    try:
        with run:
            calls = Batch(model, run.batch, loss_fn)
            made = make_plan(model, calls.forward, calls.loss_of, run.batch, machine, budgets, options, run)
    except _FAKE_TENSORS_FAIL as error:
        raise UnsupportedModel(
            f"the model does something that fake tensors cannot do ({type(error).__name__}: {error}); plan with real "
            f"tensors on the device: dry=False."
        ) from error
    said = [_UNPROVED, *_self_tested(), *costs.guesses, *run.guesses]
    return replace(made, assumptions=(*made.assumptions, *said))


def _self_tested() -> Iterator[str]:
    """Words, and a warning, if this build of torch does not do what dry capture takes for granted."""
    difference = self_test.largest_difference()
    if difference > self_test.TOLERANCE:
        said = (
            f"dry bytes are not to be relied on here: with torch {torch.__version__} the self-test differs from a real "
            f"step by {100 * difference:.1f}% (allowed: {100 * self_test.TOLERANCE:.0f}%)"
        )
        warnings.warn(f"stowplan.plan: {said}. Plan without dry=, on the device.", RuntimeWarning, stacklevel=4)
        yield said
