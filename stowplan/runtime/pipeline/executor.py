"""The actions of one device, in order: forward passes, gradients of inputs, gradients of weights.

What a microbatch leaves in a stage is its graph, and nothing else: neither the stage's input nor its output is held by
anything but what autograd saved. The input enters the graph through a node that hands its gradient over; the output is
reached again through its edge, not through the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from stowplan.core.schedule import Action, Kind, Schedule
from stowplan.runtime.pipeline.transfers import Form, Key, Transfers

__all__ = ["Executor", "Passage", "Watch", "Weights"]

Watch = Callable[[Action], AbstractContextManager[object]]


class Weights(Protocol):
    """Weight gradients that were put off in a backward pass (``deferred.Pending``)."""

    def run(self) -> None:
        """Compute them, and add them to the parameters' gradients."""


class Passage:
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
            hidden = _Enter.apply(hidden, anchor, self._input_gradient)
        output = self.stage(hidden, inputs)
        if output.requires_grad:  # not in a first stage in which nothing is trained
            self._end = torch.autograd.graph.get_gradient_edge(output)
        return output.detach()

    def backward(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """The gradient of the stage's input, from that of its output; None in the first stage."""
        end, self._end = self._end, None
        if end is not None:
            torch.autograd.backward((end,), (gradient,))
        self._weights = self._collect()
        return self._input_gradient.pop() if self._input_gradient else None

    def weights(self) -> None:
        """Whatever is still to be computed for the parameters' gradients."""
        if self._weights is not None:
            self._weights.run()
            self._weights = None


class _Enter(torch.autograd.Function):
    """What comes from the stage before, without a leaf that would hold it; its gradient is put into a list."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, anchor: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
        ctx.gradients = gradients
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        ctx.gradients.append(gradients[0])
        return None, None, None


def _unwatched(action: Action) -> AbstractContextManager[object]:
    return nullcontext()


class Executor:
    """Runs one device's part of ``schedule``, which ``check`` has passed.

    ``stages`` are those of this device by their number; ``collects`` give what a stage's backward pass has put off.
    """

    def __init__(
        self,
        schedule: Schedule,
        transfers: Transfers,
        stages: Mapping[int, torch.nn.Module],
        collects: Mapping[int, Callable[[], Weights]],
    ) -> None:
        self._order = schedule.orders[transfers.link.rank]
        self._last = schedule.num_stages - 1
        self._num_microbatches = schedule.num_microbatches
        self._transfers = transfers
        self._stages = stages
        self._collects = collects
        self.watch: Watch = _unwatched

    def step(
        self,
        forms: Sequence[Form | None],
        inputs: Sequence[Any],
        loss_gradient: torch.Tensor,
        on_stage_done: Callable[[int], object] = lambda stage: None,
    ) -> list[torch.Tensor]:
        """All actions of a step. Gives the losses of the microbatches on the device of the last stage, else nothing.

        Args:
            forms: of the inputs of each stage.
            inputs: what each microbatch brings along, for all stages.
            loss_gradient: scalar, the gradient of each microbatch's loss.
            on_stage_done: called with a stage when its parameters' gradients are complete.
        """
        passages: dict[tuple[int, int], Passage] = {}
        losses: dict[int, torch.Tensor] = {}
        left = dict.fromkeys(self._stages, len(inputs))
        self._transfers.begin(forms)
        for position, action in enumerate(self._order):
            stage, kind, microbatch = action
            last = stage == self._last
            try:
                self._transfers.post(position)
                if kind is Kind.FORWARD:
                    hidden = self._transfers.take(Key(stage, False, microbatch)) if stage else None
                    passage = passages[stage, microbatch] = Passage(self._stages[stage], self._collects[stage])
                    with self.watch(action):
                        output = passage.forward(hidden, inputs[microbatch])
                    del hidden
                    if last:
                        losses[microbatch] = output
                    else:
                        self._transfers.give(output, Key(stage + 1, False, microbatch))
                    del output
                elif kind is Kind.WEIGHT_GRADIENT:
                    with self.watch(action):
                        passages.pop((stage, microbatch)).weights()
                else:
                    if last:
                        gradient = loss_gradient.to(losses[microbatch].dtype)
                    else:
                        gradient = self._transfers.take(Key(stage, True, microbatch))
                    passage = passages[stage, microbatch]
                    with self.watch(action):
                        before = passage.backward(gradient)
                        del gradient
                        if kind is Kind.BACKWARD:
                            passages.pop((stage, microbatch)).weights()
                    if before is not None:
                        self._transfers.give(before, Key(stage - 1, True, microbatch))
                    del before
                if kind in (Kind.WEIGHT_GRADIENT, Kind.BACKWARD):
                    left[stage] -= 1
                    if not left[stage]:
                        on_stage_done(stage)
            except Exception as error:
                error.add_note(f"in action {action} of pipeline device {self._transfers.link.rank}")
                raise
        self._transfers.finish()
        return [losses[microbatch] for microbatch in sorted(losses)]
