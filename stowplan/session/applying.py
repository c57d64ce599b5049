"""Carrying plans out on models."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import torch

from stowplan.core.errors import InvalidArgument, PlanMismatch
from stowplan.core.plan import Plan
from stowplan.core.program import swaps
from stowplan.offload.blocks import Block
from stowplan.offload.copies import CopyEngine, OverlappedCopies, PlainCopies
from stowplan.offload.copies.lanes import lanes_for
from stowplan.offload.engine import Engine
from stowplan.offload.head.chunked import ChunkedHead, head_named
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.intercept import Forward, Interception
from stowplan.offload.observer import memory_observer
from stowplan.offload.parallel import class_name, inner_model
from stowplan.offload.tape.checks import Checks, Verify
from stowplan.offload.tape.proof import Tolerance
from stowplan.offload.tape.run import Counters
from stowplan.session.making import device_of
from stowplan.session.watching import Watch, failure_note

if TYPE_CHECKING:
    from stowplan.runtime.pipeline.pipeline import Pipeline
    from stowplan.session.pipelines import AppliedPipelinePlan, PipelinePlan

__all__ = ["AppliedPlan", "applied", "apply"]

# Room for the 64-byte alignment of each swapped value in the host slab.
_SLAB_ALIGNMENT = 64

_applied: weakref.WeakKeyDictionary[torch.nn.Module, AppliedPlan] = weakref.WeakKeyDictionary()


class AppliedPlan:
    """A plan in force on a model: a handle (``remove``) and a context manager.

    ``counters`` tells what was swapped and recomputed so far. ``in_flight``: forward passes whose backward is still to
    come, at most: the host slab has room for what all of them swap.
    """

    def __init__(
        self,
        plan: Plan,
        model: torch.nn.Module,
        *,
        verify: str = Verify.SAMPLE,
        strict: bool = False,
        budget_bytes: int | None = None,
        in_flight: int = 1,
        on_remove: Callable[[torch.nn.Module], object] | None = None,
    ) -> None:
        self._verify = Verify.of(verify)
        device = device_of(model)
        if plan.hardware.device_type != device.type:
            raise PlanMismatch(
                f"the plan was made for {plan.hardware.device_type} ({plan.hardware.name}), but the model is on "
                f"{device}. Move the model there, or plan anew."
            )
        if model in _applied:
            raise InvalidArgument("a plan is applied to this model already; call remove() on its handle first.")
        self.plan = plan
        self.counters = Counters()
        self._in_flight = in_flight
        budget_bytes = plan.budget_bytes if budget_bytes is None else budget_bytes
        self.watch = Watch(plan, budget_bytes, self.counters, memory_observer(device), strict)
        self._on_remove = on_remove  # wrap's, which watches by itself
        self._model = weakref.ref(model)
        self._watching: Callable[[], Interception | None] = lambda: None
        self.resume()

    def resume(self) -> None:
        """Put the hooks on the blocks, and the watch before the model's forward unless there is nothing to watch."""
        model = self._model()
        assert model is not None
        copies = _copies(self.plan, device_of(model), self._in_flight)
        blocks, decisions = _named_blocks(model, self.plan), _decisions(self.plan)
        checks, note = Checks(self._verify, exact=self.plan.exact), failure_note(self.plan)
        rounding = None if self.plan.exact else Tolerance(self.plan.tolerance)
        head = self.plan.head
        layer = head_named(model, head.module) if head is not None and head.chunk_rows else None
        self.engine = Engine(model, blocks, decisions, copies, self.counters, checks, note, rounding)
        self.head = ChunkedHead(layer, head.chunk_rows) if head is not None and layer is not None else None
        idle = self.plan.declined and not self.watch.strict
        if not idle and self._on_remove is None:  # the model holds it; this table of plans must not hold the model
            self._watching = weakref.ref(Interception(model, self._call))
        _applied[model] = self

    def _call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward under ``apply``."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        self.watch.judge()
        self.watch.batch(forward, args, kwargs)
        with self.watch.failures_noted():
            return forward(*args, **kwargs)

    def measured(self, peak_bytes: int) -> None:
        """Steps were measured. Under ``wrap`` the next forward plans anew if they took more than the budget; else warns
        at once. Raises BudgetExceeded if strict.
        """
        self.watch.measured(peak_bytes)
        if self._on_remove is None or self.watch.strict:
            self.watch.judge()

    def suspend(self) -> bool:
        """Take the hooks off. False if another plan is in force by now, or none."""
        watching = self._watching()
        if watching is not None:
            watching.remove()
        self.engine.remove()
        if self.head is not None:
            self.head.remove()
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
        if self.suspend() and model is not None and self._on_remove is not None:
            self._on_remove(model)

    def __enter__(self) -> AppliedPlan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


@overload
def apply(plan: Plan, model: torch.nn.Module, *, verify: str = "sample", strict: bool = False) -> AppliedPlan: ...


@overload
def apply(
    plan: PipelinePlan, model: Pipeline, *, verify: str = "sample", strict: bool = False
) -> AppliedPipelinePlan: ...


def apply(
    plan: Plan | PipelinePlan, model: torch.nn.Module | Pipeline, *, verify: str = "sample", strict: bool = False
) -> AppliedPlan | AppliedPipelinePlan:
    """Carry ``plan`` out on ``model`` from now on: hooks only, the module tree and state dict stay as they are.

    The first call of every block with a decision is recorded and its replay proved against the true values.

    A model in ``DistributedDataParallel`` may be given in or out of it, and a plan that was made before ``fully_shard``
    holds after it. A ``PipelinePlan`` is carried out on its ``Pipeline``, by all of its devices at once.

    Args:
        verify: what is compared, bit for bit, with what the forward pass had, once it is back for backward. "sample":
            about 128 bytes of one recomputed value per call of a block, taken in turn. "all": every recomputed and
            swapped value; a copy of each is held meanwhile, so no memory is saved. "off": nothing. A difference raises
            ReplayMismatch before an optimizer steps.
        strict: stop instead of going on with a warning where a batch is larger than planned for (PlanMismatch) or a
            step took more than the budget (BudgetExceeded, at the next forward or after ``measure``). Steps are seen
            on CUDA; on the CPU only those that ``measure`` sees.

    Raises PlanMismatch if the model is not the one the plan was made for (here, or at a block's first call), and
    InvalidArgument if a plan is in force on it already or ``verify`` is unknown.
    """
    if isinstance(plan, Plan):
        if isinstance(model, torch.nn.Module):
            return AppliedPlan(plan, inner_model(model), verify=verify, strict=strict)
    elif not isinstance(model, torch.nn.Module):
        from stowplan.session.pipelines import AppliedPipelinePlan

        return AppliedPipelinePlan(plan, model, verify=verify, strict=strict)
    raise InvalidArgument(
        f"a {type(plan).__name__} does not go with a {type(model).__name__}: a Plan goes with a model, a PipelinePlan "
        f"with a Pipeline."
    )


def _named_blocks(model: torch.nn.Module, plan: Plan) -> list[Block]:
    modules = dict(model.named_modules())
    missing = [name for name in plan.step.block_names if name not in modules]
    if missing:
        raise PlanMismatch(
            f"the plan was made for {plan.model} with blocks {plan.step.block_names[0]} … {plan.step.block_names[-1]}; "
            f"{class_name(model)} has no {missing[0]}. Plan anew with this model."
        )
    blocks = [Block(name, modules[name]) for name in plan.step.block_names]
    for number, block in enumerate(blocks):
        planned = plan.step.program_of(number).name
        if class_name(block.module) != planned:
            raise PlanMismatch(
                f"{block.name} is a {class_name(block.module)}, but the plan was made for a {planned}. Plan anew."
            )
    return blocks


def _decisions(plan: Plan) -> Sequence[Mapping[str, Any]]:
    """By block, the ``Decision`` on each saved value by its name."""
    return [plan.actions_of(block) for block in range(plan.step.num_blocks)]


def _copies(plan: Plan, device: torch.device, in_flight: int) -> CopyEngine:
    """As the plan's hardware says: beside compute, or stopping it; with room for so many forward passes at once."""
    num_swapped = sum(swaps(decision) for chosen in plan.decisions for decision in chosen)
    slab = HostSlab(
        in_flight * (plan.prediction.host_bytes + num_swapped * _SLAB_ALIGNMENT),
        device if device.type == "cuda" else None,
    )
    if plan.hardware.overlapped_copies:
        return OverlappedCopies(slab, lanes_for(device), plan.hardware.staging_blocks)
    return PlainCopies(slab)


def applied(model: torch.nn.Module) -> AppliedPlan | None:
    """The plan in force on ``model``, by ``apply`` or ``wrap``; None where there is none (yet)."""
    return _applied.get(inner_model(model))
