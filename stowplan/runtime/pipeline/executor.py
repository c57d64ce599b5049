"""The actions of one device, in order: forward passes, gradients of inputs, gradients of weights.

What a microbatch leaves in a stage is its graph, and nothing else: neither the stage's input nor its output is held by
anything but what autograd saved. The input enters the graph through a node that hands its gradient over; the output is
reached again through its edge, not through the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from stowplan.core.errors import UnsupportedModel
from stowplan.core.schedule import Action, Kind, Schedule
from stowplan.offload.parallel import local_part
from stowplan.runtime.pipeline.forms import refuse_no_loss
from stowplan.runtime.pipeline.transfers import Form, Key, Transfers

__all__ = ["Executor", "InFlight", "Watch", "Weights", "unwatched"]

Watch = Callable[[Action], AbstractContextManager[object]]


class Weights(Protocol):
    """Weight gradients that were put off in a backward pass (``deferred.PendingGradients``)."""

    def tensors(self) -> list[torch.Tensor]:
        """What they hold until then."""

    def run(self) -> None:
        """Compute them, and add them to the parameters' gradients."""


class InFlight:
    """One microbatch in one stage, from its forward pass to its weight gradients."""

    def __init__(self, stage: torch.nn.Module, collect: Callable[[], Weights]) -> None:
        self.stage = stage
        self._collect = collect
        self._end: torch.autograd.graph.GradientEdge | None = None
        self._input_gradient: list[torch.Tensor] = []
        self._weights: Weights | None = None

    def forward(self, hidden: torch.Tensor | None, inputs: Any) -> torch.Tensor:
        """The stage's output, which nothing here holds."""
        if hidden is not None:
            anchor = torch.zeros((), device=hidden.device, requires_grad=True)
            hidden = _Enter.apply(hidden, anchor, self._input_gradient)  # type: ignore[no-untyped-call]
        given: Any = self.stage(hidden, inputs)
        if not isinstance(given, torch.Tensor):
            refuse_no_loss(given)
        output: torch.Tensor = given
        del given
        if output.requires_grad:  # not in a first stage in which nothing is trained
            self._end = torch.autograd.graph.get_gradient_edge(output)
        return output.detach()

    def backward(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """The gradient of the stage's input, from that of its output; None in the first stage."""
        end, self._end = self._end, None
        fresh = [parameter for parameter in self.stage.parameters() if parameter.grad is None]
        if end is not None:
            torch.autograd.backward((end,), (gradient,))
        self._weights = self._collect()
        before = self._input_gradient.pop() if self._input_gradient else None
        _part(fresh, self._weights.tensors() if before is None else [before, *self._weights.tensors()])
        return before

    def weights(self) -> None:
        """Whatever is still to be computed for the parameters' gradients."""
        if self._weights is not None:
            self._weights.run()
            self._weights = None


def _part(parameters: Iterable[torch.nn.Parameter], held: Iterable[torch.Tensor]) -> None:
    """Give gradients that lie in the memory of ``held`` memory of their own.

    Autograd makes the first gradient of a parameter of any tensor that nobody else holds, be it a view of one that
    goes to the stage before or that W needs (``hidden + positions[None]``), and adds the next microbatch's to it.
    """
    storages = {tensor.untyped_storage().data_ptr() for tensor in held}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or gradient.layout is not torch.strided:
            continue
        if local_part(gradient).untyped_storage().data_ptr() in storages:
            parameter.grad = gradient.clone()


class _Enter(torch.autograd.Function):
    """What comes from the stage before, without a leaf that would hold it; its gradient is put into a list."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, anchor: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
        ctx.gradients = gradients
        return hidden.detach()  # no view: that could not be written to in place

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        ctx.gradients.append(gradients[0])
        return None, None, None


def unwatched(action: Action) -> AbstractContextManager[object]:
    """What is entered for each action where nobody looks."""
    return nullcontext()


class Executor:
    """Runs one device's part of ``schedule``, which ``check`` has passed.

    ``stages`` are those of this device by their number; ``collects`` give what a stage's backward pass has put off.
    ``watch`` is entered for each action while it computes, without what it waits for.
    """

    def __init__(
        self,
        schedule: Schedule,
        transfers: Transfers,
        stages: Mapping[int, torch.nn.Module],
        collects: Mapping[int, Callable[[], Weights]],
    ) -> None:
        self.order = schedule.orders[transfers.link.rank]
        self.last = schedule.num_stages - 1
        self.transfers = transfers
        self.stages = stages
        self.collects = collects
        self.watch: Watch = unwatched

    def step(
        self,
        forms: Sequence[Form | None],
        inputs: Sequence[Any],
        loss_gradient: torch.Tensor,
        on_weights: Callable[[int, bool], object] = lambda stage, complete: None,
    ) -> list[torch.Tensor]:
        """All actions of a step. Gives the losses of the microbatches on the device of the last stage, else nothing.

        Args:
            forms: of the inputs of each stage.
            inputs: what each microbatch brings along, for all stages.
            loss_gradient: scalar, the gradient of each microbatch's loss.
            on_weights: called with a stage when a microbatch's gradients have been added to those of its parameters,
                and whether that was the last one.
        """
        step = _Step(self, inputs, loss_gradient, on_weights)
        self.transfers.begin(forms)
        for position, action in enumerate(self.order):
            try:
                self.transfers.post(position)
                step.run(action)
            except Exception as error:
                error.add_note(f"in action {action} of pipeline device {self.transfers.link.rank}")
                raise
        self.transfers.finish()
        return [step.losses[microbatch] for microbatch in sorted(step.losses)]


class _Step:
    """What is under way in a step."""

    def __init__(
        self,
        executor: Executor,
        inputs: Sequence[Any],
        loss_gradient: torch.Tensor,
        on_weights: Callable[[int, bool], object],
    ) -> None:
        self.losses: dict[int, torch.Tensor] = {}
        self._executor = executor
        self._transfers = executor.transfers
        self._inputs = inputs
        self._loss_gradient = loss_gradient
        self._on_weights = on_weights
        self._in_flight: dict[tuple[int, int], InFlight] = {}
        self._left = dict.fromkeys(executor.stages, len(inputs))

    def run(self, action: Action) -> None:
        if action.kind is Kind.FORWARD:
            self._forward(action)
        elif action.kind is not Kind.WEIGHT_GRADIENT:
            self._backward(action)
        if action.kind in (Kind.WEIGHT_GRADIENT, Kind.BACKWARD):
            self._weights(action)

    def _forward(self, action: Action) -> None:
        stage, _, microbatch = action
        hidden = self._transfers.take(Key(stage, False, microbatch)) if stage else None
        in_flight = InFlight(self._executor.stages[stage], self._executor.collects[stage])
        self._in_flight[stage, microbatch] = in_flight
        with self._executor.watch(action):
            output = in_flight.forward(hidden, self._inputs[microbatch])
            del hidden
        if stage == self._executor.last:
            refuse_no_loss(output)
            self.losses[microbatch] = output
        else:
            self._transfers.give(output, Key(stage + 1, False, microbatch))

    def _backward(self, action: Action) -> None:
        stage, _, microbatch = action
        if stage == self._executor.last:
            loss = self.losses[microbatch]
            gradient = self._loss_gradient.to(loss.dtype).reshape(loss.shape)
            del loss
        else:
            gradient = self._transfers.take(Key(stage, True, microbatch))
        with self._executor.watch(action):
            before = self._in_flight[stage, microbatch].backward(gradient)
            del gradient
        if stage:
            if before is None:
                raise UnsupportedModel(
                    f"what stage {stage} gives does not depend on what it is given, so that no gradient goes back: "
                    f"the model cannot be cut there."
                )
            self._transfers.give(before, Key(stage - 1, True, microbatch))

    def _weights(self, action: Action) -> None:
        stage, _, microbatch = action
        with self._executor.watch(action):
            self._in_flight.pop((stage, microbatch)).weights()
        self._left[stage] -= 1
        self._on_weights(stage, not self._left[stage])
