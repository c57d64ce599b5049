"""Sequences of modules, losses and uses that are not the usual ones: computed as in one process, or refused by all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import Linear, ReLU, Sequential, Tanh
from torch.nn.functional import mse_loss

from stowplan.core.errors import InvalidArgument
from stowplan.runtime.pipeline.pipeline import Pipeline
from tests.distributed import Ranks

NUM = 3
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def one_number(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return mse_loss(output, target).reshape(1)


def linear() -> Linear:
    return Linear(4, 4)


def modules_of(kind: str) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    if kind == "in place":
        return [linear(), Sequential(ReLU(inplace=True), linear()), Sequential(ReLU(inplace=True), linear()), linear()]
    if kind == "without parameters":
        return [linear(), Tanh(), Tanh(), linear()]
    return [linear().to(torch.float64 if kind == "float64" else torch.float32) for _ in range(4)]


def batch_for(modules: Sequence[torch.nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtype = next(modules[0].parameters()).dtype
    first, second = torch.randn(2, 2 * NUM, 4, generator=generator, dtype=dtype)
    return first, second


def in_one_process(modules: Sequence[torch.nn.Module], loss_fn: Loss = mse_loss) -> dict[str, torch.Tensor | None]:
    for value, target in zip(*(tensor.chunk(NUM) for tensor in batch_for(modules)), strict=True):
        for module in modules:
            value = module(value)
        (loss_fn(value, target) / NUM).backward()
    return {f"{i}.{name}": p.grad for i, module in enumerate(modules) for name, p in module.named_parameters()}


def pipeline_of(modules: Sequence[torch.nn.Module], schedule: str = "v-half", loss_fn: Loss = mse_loss) -> Pipeline:
    return Pipeline(modules, num_microbatches=NUM, schedule=schedule, loss_fn=loss_fn)


def check_gradients(pipeline: Pipeline, expected: dict[str, torch.Tensor | None]) -> None:
    for name, parameter in pipeline.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, expected[name]), name


def same(rank: int, kind: str, loss_fn: Loss = mse_loss) -> None:
    expected = in_one_process(modules_of(kind), loss_fn)
    modules = modules_of(kind)
    pipeline = pipeline_of(modules, loss_fn=loss_fn)
    loss = pipeline.step(batch_for(modules))
    assert loss is None or loss.shape == ()
    check_gradients(pipeline, expected)


@pytest.mark.parametrize(
    ("kind", "loss_fn"),
    [("in place", mse_loss), ("without parameters", mse_loss), ("float64", mse_loss), ("", one_number)],
)
def test_computed_as_in_one_process(ranks: Ranks, kind: str, loss_fn: Loss) -> None:
    ranks.run(same, kind, loss_fn)


def used_again(rank: int) -> None:
    """Modules of a pipeline are anybody's between its steps, and after it."""
    modules = modules_of("")
    expected = in_one_process(modules_of(""))
    batch = batch_for(modules)

    def forget() -> None:
        for module in modules:
            module.zero_grad()

    first = pipeline_of(modules)
    first.step(batch)
    forget()
    alone = in_one_process(modules)
    assert all(torch.equal(alone[name], expected[name]) for name in expected)  # type: ignore[arg-type]
    forget()
    second = pipeline_of(modules)
    second.step(batch)
    check_gradients(second, expected)
    forget()
    first.step(batch)
    check_gradients(first, expected)
    forget()
    del first, second
    assert not any("forward" in module.__dict__ for module in modules)


def test_modules_of_one_pipeline_are_used_by_another(ranks: Ranks) -> None:
    ranks.run(used_again)


def told(rank: int) -> None:
    modules = modules_of("")
    expected = in_one_process(modules_of(""))
    pipeline = pipeline_of(modules)
    batch = batch_for(modules)
    for call in (pipeline.step, pipeline.evaluate, pipeline.probe, pipeline.measure):
        with pytest.raises(
            InvalidArgument, match=r"the last stage gives a tensor of shape \(2, 4\), no loss: batches need"
        ):
            call(batch[:1])
    with torch.no_grad(), pytest.raises(InvalidArgument, match=r"leave no_grad\(\), or call evaluate"):
        pipeline.step(batch)
    pipeline.step(batch)
    check_gradients(pipeline, expected)


def test_batches_without_targets_and_steps_without_gradients(ranks: Ranks) -> None:
    ranks.run(told)
