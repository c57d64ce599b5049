"""One microbatch in one stage: what goes on is nobody else's memory, and what comes in may be written to."""

from __future__ import annotations

import pytest
import torch

from stowplan.runtime.pipeline.deferred import WeightGradients
from stowplan.runtime.pipeline.executor import InFlight


class Positions(torch.nn.Module):
    """Adds a table to a single sample: the table's gradient is a view of the one that goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(6, 4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.table.unsqueeze(0)


class Stage(torch.nn.Sequential):
    def forward(self, hidden: torch.Tensor, inputs: object = None) -> torch.Tensor:
        output: torch.Tensor = super().forward(hidden)
        return output


def passes(stage: Stage, count: int) -> tuple[list[InFlight], WeightGradients]:
    deferred = WeightGradients()
    deferred.install(stage)
    flights = [InFlight(stage, deferred.collect) for _ in range(count)]
    for flight in flights:
        flight.forward(torch.randn(1, 6, 4), None)
    return flights, deferred


def test_a_gradient_on_its_way_is_not_added_to() -> None:
    stage = Stage(Positions())
    (first, second), _ = passes(stage, 2)
    sent = first.backward(torch.ones(1, 6, 4))
    assert sent is not None
    second.backward(torch.ones(1, 6, 4))
    assert torch.equal(sent, torch.ones(1, 6, 4))
    assert torch.equal(stage[0].table.grad, torch.full((6, 4), 2.0))


def test_a_gradient_that_was_put_off_is_not_added_to() -> None:
    stage = Stage(torch.nn.Linear(4, 4), Positions())
    flights, _ = passes(stage, 2)
    for flight in flights:
        flight.backward(torch.ones(1, 6, 4))
    for flight in flights:
        flight.weights()
    assert torch.equal(stage[0].bias.grad, torch.full((4,), 12.0))


def test_what_comes_in_may_be_written_to_in_place() -> None:
    flight = InFlight(Stage(torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 4)), WeightGradients().collect)
    hidden = torch.randn(1, 6, 4)
    positive = hidden > 0
    output = flight.forward(hidden, None)
    gradient = flight.backward(torch.ones_like(output))
    assert gradient is not None
    assert torch.equal(gradient != 0, positive)


def test_what_the_stage_before_needs_must_not_be_written_to() -> None:
    """Two stages of one device hand over memory: writing to it is noticed as in one process."""
    before = InFlight(Stage(torch.nn.Linear(4, 4), torch.nn.Tanh()), WeightGradients().collect)
    after = InFlight(Stage(torch.nn.ReLU(inplace=True)), WeightGradients().collect)
    output = after.forward(before.forward(torch.randn(1, 6, 4), None), None)
    gradient = after.backward(torch.ones_like(output))
    assert gradient is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward(gradient)
