"""Threads: each is exact by itself, or hears of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from stowplan.core.errors import ReplayMismatch
from stowplan.offload.tape.run import Run
from tests.offload.toys import (
    NUM_RECORDINGS,
    NUM_STEPS,
    Tensors,
    all_policies,
    assert_exact,
    assert_same,
    call_language_model,
    call_toy,
    feed_forward,
    gradients,
    make_gpt2,
    make_llama,
    put_under_plan,
    rows,
    stack,
    tokens,
)


def in_threads(*works: Callable[[], Tensors]) -> list[Tensors]:
    """What each of the works gives, all started together; the first error of any is raised."""
    together = threading.Barrier(len(works))
    found: list[Any] = [None] * len(works)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            together.wait()
            found[number] = works[number]()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    return found


@all_policies
def test_backward_in_another_thread(policy: str) -> None:
    def train(model: Any) -> Tensors:
        for step in range(NUM_STEPS):
            loss = model(**tokens(step), use_cache=False).loss
            in_threads(lambda loss=loss: [loss.backward()])  # type: ignore[misc]
        return gradients(model)

    assert_exact(make_gpt2, train, policy, call_language_model)


class Fork(nn.Module):
    """Two outputs whose backward begins at nodes of their own, both in need of the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Fork.Block()])

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = torch.exp(self.linear(x))
            return hidden.sin(), hidden.cos()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.blocks[0](x)


@all_policies
def test_two_threads_run_backward_through_the_same_call(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is first brings the values back, for both."""

    def slowly(self: Run) -> None:
        time.sleep(0.02)
        restore(self)
        time.sleep(0.02)

    def train(model: Any) -> Tensors:
        parameters = list(model.parameters())

        def slopes(out: torch.Tensor) -> Tensors:
            return list(torch.autograd.grad(out.sum(), parameters, retain_graph=True))

        found: Tensors = []
        for _ in range(NUM_STEPS):
            outs = model(rows())
            found += [t for ts in in_threads(*(lambda out=out: slopes(out) for out in outs)) for t in ts]  # type: ignore[misc]
        return found

    restore = Run.restore
    monkeypatch.setattr(Run, "restore", slowly)
    assert_exact(lambda: stack_of(Fork), train, policy, call_toy)


def stack_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


@all_policies
def test_two_models_in_two_threads(policy: str) -> None:
    """Both are recorded, proved and replayed at the same time."""

    def train(model: Any, seed: int) -> Tensors:
        found: Tensors = []
        for step in range(2 * NUM_STEPS):
            loss = model(**tokens(seed + step), use_cache=False).loss
            loss.backward()
            found.append(loss.detach())
        return [*found, *gradients(model)]

    expected = [train(make_llama(), seed) for seed in (0, 100)]
    planned = [put_under_plan(make_llama(), policy, call_language_model) for _ in range(2)]
    found = in_threads(*(lambda i=i: train(planned[i].model, 100 * i) for i in range(2)))  # type: ignore[misc]
    for number in range(2):
        assert_same(found[number], expected[number])
        assert planned[number].engine.counters.recorded_calls == 3 * NUM_RECORDINGS
        assert planned[number].engine.counters.departures == 0
        assert planned[number].slab.used_bytes == 0


@all_policies
def test_one_model_called_from_two_threads(policy: str) -> None:
    """As DataParallel calls its replicas, but on one: calls that meet in a block keep what they save."""

    def train(model: Any, seed: int) -> Tensors:
        found: Tensors = []
        for step in range(3 * NUM_STEPS):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed + step))
            loss = model(x).square().mean()
            found += [loss.detach(), *torch.autograd.grad(loss, list(model.first_and_second))]
        return found

    def make() -> Any:
        model = stack(feed_forward)
        model.first_and_second = [p for b in model.blocks for part in (b.first, b.second) for p in part.parameters()]
        return model

    plain = make()
    expected = [train(plain, seed) for seed in (0, 100)]
    planned = put_under_plan(make(), policy, call_toy)
    model = planned.model
    model.first_and_second = [p for b in model.blocks for part in (b.first, b.second) for p in part.parameters()]
    found = in_threads(*(lambda i=i: train(model, 100 * i) for i in range(2)))  # type: ignore[misc]
    for number in range(2):
        assert_same(found[number], expected[number])
    assert planned.slab.used_bytes == 0


def _meets_another_call(block: Any, x: torch.Tensor) -> torch.Tensor:
    wait = block.unseen.get("wait")
    hidden = functional.gelu(block.first(x))
    if wait is not None:
        wait(x)
    return block.second(hidden.sin()) + x


@all_policies
@pytest.mark.parametrize("num_calls_before", [0, NUM_RECORDINGS])
def test_two_calls_inside_one_block_at_the_same_time(num_calls_before: int, policy: str) -> None:
    """Not by chance: each waits in the block until the other is there, too."""
    planned = put_under_plan(stack(_meets_another_call), policy, call_toy)
    plain = stack(_meets_another_call)
    for _ in range(num_calls_before):
        planned.model(rows()).sum().backward()
    planned.model.zero_grad()
    both = threading.Barrier(2, timeout=60)
    planned.model.blocks[1].unseen["wait"] = lambda x: both.wait()

    def slopes(model: Any, seed: int) -> Tensors:
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
        used = [p for name, p in model.named_parameters() if "norm" not in name]
        return list(torch.autograd.grad(model(x).square().mean(), used))

    found = in_threads(*(lambda i=i: slopes(planned.model, i) for i in range(2)))  # type: ignore[misc]
    for seed in range(2):
        assert_same(found[seed], slopes(plain, seed))
    assert planned.slab.used_bytes == 0


class Disturbed(nn.Module):
    """Another thread draws random numbers while the block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.disturbance: list[Callable[[], Any]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.dropout(self.linear(x), 0.3).sin()
        for draw in self.disturbance:
            thread = threading.Thread(target=draw)
            thread.start()
            thread.join()
        return functional.dropout(hidden, 0.3).sin()


class DisturbedStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Disturbed() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_random_numbers_drawn_by_another_thread_are_never_a_silent_wrong_gradient() -> None:
    """The CPU's generator is one for all threads. A generator of its own does no harm."""
    model = put_under_plan(stack_of(DisturbedStack), "recompute", call_toy).model
    for _ in range(NUM_RECORDINGS + 1):
        model(rows()).sum().backward()
    own = torch.Generator()
    model.blocks[1].disturbance.append(lambda: torch.rand(3, generator=own))
    model(rows()).sum().backward()
    model.blocks[1].disturbance.append(lambda: torch.rand(3))
    loss = model(rows()).sum()
    with pytest.raises(ReplayMismatch, match=r"random numbers of blocks\.1 cannot be drawn again: another thread"):
        loss.backward()
    model.blocks[1].disturbance.clear()
    model(rows()).sum().backward()
