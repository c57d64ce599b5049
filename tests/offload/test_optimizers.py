"""What an optimizer's step costs, found on stand-ins, against a real step under the profiler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stowplan.core.errors import InvalidArgument
from stowplan.offload.capture.instruments import RealInstruments
from stowplan.offload.capture.optimizers import OptimizerCost, optimizer_cost, state_bytes
from stowplan.offload.memory_log import memory_log

HERE = RealInstruments(torch.device("cpu"))
KIB = 2**10
WIDTH = 96

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW for each alone": lambda p: torch.optim.AdamW(p, foreach=False),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
    "RMSprop": torch.optim.RMSprop,
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def model_with_gradients() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH))
    model(torch.randn(2, WIDTH)).square().mean().backward()
    return model


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def num_parameters(model: nn.Module) -> int:
    return len(list(model.parameters()))


def real_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of the states, and the peak above them, of a step in steady state."""
    optimizer.step()
    with memory_log(torch.device("cpu")) as log:
        optimizer.step()
    (segment,) = log.segments
    return state_bytes(optimizer), segment.peak_bytes


@optimizers
def test_the_cost_is_that_of_a_real_step(make: Make) -> None:
    model = model_with_gradients()
    optimizer = make(model.parameters())
    cost = optimizer_cost(optimizer, HERE)
    states, peak = real_step(model, optimizer)
    assert cost.exact
    assert cost.state_bytes == pytest.approx(states, abs=KIB)
    assert cost.peak_bytes == pytest.approx(peak, abs=KIB)
    assert cost.seconds > 0


def test_states_by_formula() -> None:
    model = model_with_gradients()
    size, counts = parameter_bytes(model), num_parameters(model) * torch.float32.itemsize
    largest = max(p.nbytes for p in model.parameters())

    def cost(name: str) -> OptimizerCost:
        return optimizer_cost(OPTIMIZERS[name](model.parameters()), HERE)

    assert cost("AdamW foreach").state_bytes == 2 * size + counts  # two moments and a step count
    assert cost("AdamW amsgrad").state_bytes == 3 * size + counts
    assert cost("AdamW foreach").peak_bytes == pytest.approx(size, abs=KIB)  # one denominator for each at a time
    assert cost("AdamW for each alone").peak_bytes == pytest.approx(2 * largest, abs=KIB)  # a root and its quotient
    assert cost("AdamW fused").peak_bytes == pytest.approx(0, abs=KIB)
    assert cost("SGD momentum").state_bytes == size
    assert cost("SGD").state_bytes == 0
    rows_and_columns = sum(sum(p.shape) if p.ndim == 2 else p.numel() for p in model.parameters())
    assert cost("Adafactor").state_bytes == rows_and_columns * torch.float32.itemsize + counts


def everything_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), torch.get_rng_state()]
    found += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return [t.detach().clone() for t in found]


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize("has_schedule", [False, True])
@optimizers
def test_the_real_optimizer_is_untouched(make: Make, has_schedule: bool, num_steps: int) -> None:
    model = model_with_gradients()
    optimizer = make(model.parameters())
    if has_schedule:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(num_steps):
        optimizer.step()
        if has_schedule:
            schedule.step()
    before = everything_of(model, optimizer)
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    members = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    optimizer_cost(optimizer, HERE)
    after = everything_of(model, optimizer)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == members


@optimizers
def test_a_schedule_changes_no_cost(make: Make) -> None:
    """Schedules put a step of their own before the optimizer's, bound to the real one."""
    costs = []
    for has_schedule in (False, True):
        optimizer = make(model_with_gradients().parameters())
        if has_schedule:
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        costs.append(optimizer_cost(optimizer, HERE)[:2])
    assert costs[0] == costs[1]


def test_hooks_on_steps_do_not_see_the_stand_ins() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    seen = []
    optimizer = torch.optim.SGD(model_with_gradients().parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *args: seen.append("its own"))
    handle = register_optimizer_step_post_hook(lambda *args: seen.append("everybody's"))
    try:
        optimizer_cost(optimizer, HERE)
    finally:
        handle.remove()
    assert seen == []


def test_a_learning_rate_in_a_tensor() -> None:
    model = model_with_gradients()
    rate = torch.tensor(1e-3)
    cost = optimizer_cost(torch.optim.AdamW(model.parameters(), lr=rate, foreach=False), HERE)
    assert cost.state_bytes >= 2 * parameter_bytes(model)
    assert rate.item() == pytest.approx(1e-3)


class RemembersSteps(torch.optim.SGD):
    """Lists, sets and dicts of its own, written by every step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.history: list[int] = []
        self.seen: set[int] = set()
        self.norms: dict[str, float] = {}

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.history.append(len(self.history))
        self.seen.add(len(self.seen))
        self.norms[str(len(self.norms))] = 1.0


def test_lists_of_the_optimizer_are_not_written_by_the_stand_ins() -> None:
    optimizer = RemembersSteps(model_with_gradients().parameters())
    optimizer.step()
    optimizer_cost(optimizer, HERE)
    assert (optimizer.history, optimizer.seen, optimizer.norms) == ([0], {0}, {"0": 1.0})


def test_groups_and_frozen_parameters() -> None:
    model = model_with_gradients()
    model[0].requires_grad_(False)
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "momentum": 0.9}]
    groups.append({"params": model[2].parameters()})
    cost = optimizer_cost(torch.optim.SGD(groups, lr=0.1), HERE)
    assert cost.state_bytes == parameter_bytes(model[1])


def test_nothing_to_step() -> None:
    assert optimizer_cost(None, HERE) == OptimizerCost(0, 0, 0.0)
    with pytest.raises(InvalidArgument, match=r"optimizer=Linear is not a torch\.optim\.Optimizer"):
        optimizer_cost(nn.Linear(2, 2), HERE)  # type: ignore[arg-type]


def test_states_are_counted_once_by_storage() -> None:
    parameter = nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    shared = torch.zeros(16)
    optimizer.state[parameter] = {"a": shared[:8], "b": shared[8:], "c": 3, "d": [torch.zeros(4)]}
    assert state_bytes(optimizer) == shared.nbytes + 4 * torch.float32.itemsize
