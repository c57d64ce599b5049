"""Sequences of modules, losses and uses that are not the usual ones: computed as in one process, or refused by all."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import Linear, ReLU, Sequential, Tanh
from torch.nn.functional import mse_loss

import stowplan
from stowplan.core.errors import InvalidArgument, StowplanError
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
    whole = Sequential(*modules)
    for part, target in zip(*(tensor.chunk(NUM) for tensor in batch_for(modules)), strict=True):
        (loss_fn(whole(part), target) / NUM).backward()
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


class Fragile(torch.nn.Linear):
    """Fails in backward with gradients of weights, if it is told to; counts its calls."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.fails = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.calls, torch.Tensor)
        self.calls += 1
        if self.fails and torch.is_grad_enabled():
            hidden.register_hook(_fail)
        elif self.fails:
            raise OSError("the disk is gone")
        return super().forward(hidden)


def _fail(gradient: torch.Tensor) -> None:
    raise OSError("the disk is gone")


def fails_as_it_is_tried(rank: int) -> None:
    """One stage cannot be probed or planned: all hear of it, nothing is changed, and steps go on."""
    modules = [linear(), Sequential(Fragile(), linear())]
    expected = in_one_process(copy.deepcopy(modules))
    pipeline = pipeline_of(modules, "zb-h1")
    batch = batch_for(modules)
    pipeline.evaluate(batch)
    fragile = modules[1][0]  # type: ignore[index]
    calls = fragile.calls.clone()
    fragile.fails = True
    for call in (pipeline.probe, partial(stowplan.plan, pipeline, budget="1GiB", host_budget="1MiB")):
        with pytest.raises(OSError if rank == 1 else StowplanError, match="the disk is gone"):
            call(batch)
        assert torch.equal(fragile.calls, calls)
    fragile.fails = False
    pipeline.step(batch)
    check_gradients(pipeline, expected)


def test_a_stage_that_cannot_be_probed(ranks: Ranks) -> None:
    ranks.run(fails_as_it_is_tried)


def fails_in_another_shape(rank: int) -> None:
    """Buffers of a stage that fails are as before."""
    modules = [linear(), Sequential(Fragile(), linear())]
    pipeline = pipeline_of(modules, "1f1b")
    fragile = modules[1][0]  # type: ignore[index]
    fragile.fails = True
    with pytest.raises(OSError if rank == 1 else InvalidArgument, match="the disk is gone"):
        pipeline.step(batch_for(modules))
    assert not fragile.calls


def test_buffers_of_a_stage_that_fails(ranks: Ranks) -> None:
    ranks.run(fails_in_another_shape)


def measured_while_one_profiles(rank: int) -> None:
    modules = modules_of("")
    pipeline = pipeline_of(modules)
    profiler = torch.profiler.profile() if rank == 0 else nullcontext()
    with profiler, pytest.raises(StowplanError, match="a torch profiler"):
        pipeline.measure(batch_for(modules))
    pipeline.measure(batch_for(modules))


def test_measuring_while_one_process_is_profiled(ranks: Ranks) -> None:
    ranks.run(measured_while_one_profiles)


def groups(rank: int) -> None:
    own = dist.new_group([0], timeout=timedelta(seconds=77))
    if rank == 1:
        with pytest.raises(InvalidArgument, match="this process is not in group="):
            Pipeline(modules_of(""), num_microbatches=NUM, loss_fn=mse_loss, group=own)
        return
    link = Pipeline(modules_of(""), num_microbatches=NUM, loss_fn=mse_loss, group=own).link
    for made in (link._down, link._up):
        assert made._get_backend(link.device).options._timeout == timedelta(seconds=77)


def test_groups_are_like_the_pipelines(ranks: Ranks) -> None:
    ranks.run(groups)


def in_more_groups(rank: int) -> None:
    for _ in range(1 + rank * 2):
        dist.new_group([rank], use_local_synchronization=True)
    modules = modules_of("")
    pipeline = pipeline_of(modules)
    pipeline.step(batch_for(modules))
    check_gradients(pipeline, in_one_process(modules_of("")))


def test_processes_may_be_in_different_numbers_of_groups(ranks: Ranks) -> None:
    ranks.run(in_more_groups)


def applied_twice(rank: int) -> None:
    modules = modules_of("")
    pipeline = pipeline_of(modules)
    batch = batch_for(modules)
    before = pipeline.schedule
    plan = stowplan.plan(pipeline, batch, budget="1GiB", host_budget="1MiB")
    other = dataclasses.replace(plan, timeline=pipeline.predict(pipeline.probe(batch)))
    handle = stowplan.apply(plan, pipeline)
    with pytest.raises(InvalidArgument, match=r"applied to this pipeline already; call remove\(\)"):
        stowplan.apply(other, pipeline)
    handle.remove()
    handle.remove()
    assert pipeline.schedule is before
    if rank == 0:  # the other one takes no part in it
        with pytest.raises(ArithmeticError), stowplan.apply(dataclasses.replace(plan, plans={}), pipeline):
            raise ArithmeticError
    else:
        stowplan.apply(dataclasses.replace(plan, plans={}), pipeline).remove()
    assert pipeline.schedule is before
    no_plan: Any = "of another pipeline"
    broken = dataclasses.replace(plan, plans={99: no_plan} if rank == 0 else {})
    with pytest.raises(KeyError if rank == 0 else StowplanError):
        stowplan.apply(broken, pipeline)
    assert pipeline.schedule is before
    pipeline.step(batch)
    check_gradients(pipeline, in_one_process(modules_of("")))


def test_plans_that_are_applied_twice_or_cannot_be(ranks: Ranks) -> None:
    ranks.run(applied_twice)
