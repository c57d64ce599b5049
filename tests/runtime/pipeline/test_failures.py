"""What cannot be, or goes wrong on the way, is said; nobody goes on from half a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import stowplan
from stowplan.core.errors import InvalidArgument, InvalidSchedule, UnsupportedModel
from stowplan.planner.schedule import generate
from stowplan.runtime.pipeline.pipeline import Pipeline
from tests.distributed import RankFailed, Ranks
from tests.runtime.pipeline.one_process import Case, batch_of, build

pytestmark = pytest.mark.slow  # processes of their own

CASE = Case(num_layers=4, num_microbatches=4)


def of(case: Case = CASE, **more: Any) -> Pipeline:
    return Pipeline(build(case), **{"num_microbatches": case.num_microbatches, **more})


def test_without_process_groups() -> None:
    assert not dist.is_initialized()
    with pytest.raises(InvalidArgument, match=r"start the script with torchrun, and call torch\.distributed\.init_"):
        of()


def refusals(rank: int) -> None:
    with pytest.raises(InvalidArgument, match="3 layers"):
        of(Case(num_layers=3))
    with pytest.raises(InvalidArgument, match="for 3 devices and 4 microbatches, the group has 2"):
        of(schedule=generate("1f1b", 3, 4))
    with pytest.raises(InvalidArgument, match="num_microbatches=4"):
        of(schedule=generate("1f1b", 2, 6))
    fine = generate("v-half", 2, 4)
    with pytest.raises(InvalidSchedule, match="never does"):
        of(schedule=dataclasses.replace(fine, orders=(fine.orders[0][:-1], fine.orders[1])))
    with pytest.raises(InvalidArgument, match="v-quarter"):
        of(schedule="v-quarter")
    with pytest.raises(UnsupportedModel, match="DistributedDataParallel"):
        Pipeline(DistributedDataParallel(build(CASE)), num_microbatches=4)

    pipeline = of()
    with pytest.raises(InvalidArgument, match="the schedule places its stages on devices"):
        pipeline.use(generate("1f1b", 2, 4))
    batch = batch_of(CASE)
    uneven = {name: value[:-1] for name, value in batch.items()}
    with pytest.raises(InvalidArgument, match=r"3.*4"):
        pipeline.step(uneven)
    pipeline.step(batch)  # what was refused has changed nothing
    with pytest.raises(InvalidArgument, match=r"the state has no model\.\S+, .* and more, which stage"):
        pipeline.load_state_dict({})


def test_what_does_not_fit_is_refused(ranks: Ranks) -> None:
    ranks.run(refusals)


def wrapped_by_prepare(rank: int) -> None:
    def wrap(stage: torch.nn.Module) -> None:
        for name, module in list(stage.named_modules()):
            if isinstance(module, torch.nn.Linear):
                stage.get_submodule(name.rpartition(".")[0]).register_module(
                    name.rpartition(".")[2], DistributedDataParallel(module)
                )
                return

    with pytest.raises(UnsupportedModel, match="is wrapped by DistributedDataParallel"):
        of(prepare=wrap)


def test_stages_that_are_wrapped(ranks: Ranks) -> None:
    ranks.run(wrapped_by_prepare)


def other_shapes(rank: int) -> None:
    """Without batches everywhere, shapes cannot change; with them, they can."""
    case = dataclasses.replace(CASE, sequence=12)
    pipeline = of(schedule="1f1b", num_microbatches=4)
    pipeline.step(batch_of(CASE))
    loss = pipeline.step(batch_of(case))
    pipeline.step(batch_of(CASE))
    assert (loss is not None) == (rank == 1)


def test_other_shapes_where_all_have_batches(ranks: Ranks) -> None:
    ranks.run(other_shapes)


def shapes_that_only_some_know(rank: int) -> str:
    pipeline = Pipeline(build(Case(num_layers=6)), num_microbatches=4, schedule="1f1b")
    middle = rank == 1
    pipeline.step(None if middle else batch_of(CASE))
    if not middle:
        with pytest.raises(InvalidArgument, match=r"pad batches to one shape, or give them to all devices"):
            pipeline.step(batch_of(dataclasses.replace(CASE, sequence=12)))
    dist.barrier()
    return "refused"


def test_other_shapes_where_some_have_no_batches() -> None:
    three = Ranks(3)
    try:
        assert three.run(shapes_that_only_some_know) == ["refused"] * 3
    finally:
        three.stop()


def bad_batches(rank: int) -> None:
    """The first stage fails as it is tried out: both ranks hear of it, and go on with a better batch."""
    pipeline = of(schedule="1f1b")
    batch = batch_of(CASE)
    for ids in (batch["input_ids"].float(), torch.full((4, 6), 10**6)):  # never, and of another shape
        bad = {"input_ids": ids, "labels": ids}
        if rank == 0:
            with pytest.raises((RuntimeError, IndexError)) as caught:
                pipeline.step(bad)
            assert caught.value.__notes__ == ["in stage 0, on device 0 of the pipeline, as it was tried out"]
        else:
            with pytest.raises(InvalidArgument, match=r"stage 0, on device 0 of the pipeline, fails with the first"):
                pipeline.step(bad)
        pipeline.step(batch)


def test_a_batch_that_fails_at_once(ranks: Ranks) -> None:
    ranks.run(bad_batches)


class Failing(torch.nn.Module):
    """Fails in the forward or the backward of one microbatch, if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.calls = 0
        self.fail_at: tuple[str, int] | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.layer(hidden)
        if not torch.is_grad_enabled() or self.fail_at is None:
            return out
        self.calls += 1
        where, call = self.fail_at
        if self.calls == call:
            if where == "F":
                raise OSError("the disk is gone")

            def fail(gradient: torch.Tensor) -> None:
                raise OSError("the disk is gone")

            out.register_hook(fail)
        return out


def failing(rank: int, where: str) -> str:
    """Rank 1 fails in its third microbatch; rank 0 would wait for it."""
    modules = [Failing() for _ in range(2)]
    pipeline = Pipeline(modules, num_microbatches=4, schedule="zb-h1", loss_fn=torch.nn.functional.mse_loss)
    batch = torch.ones(8, 4), torch.ones(8, 4)
    pipeline.step(batch)
    if rank == 0:
        pipeline.step(batch)
        return "never"
    modules[1].fail_at = where, 3
    with pytest.raises(OSError, match="the disk is gone") as caught:
        pipeline.step(batch)
    assert caught.value.__notes__ == [f"in action 1{where}2 of pipeline device 1"]
    for call in (pipeline.step, pipeline.evaluate, pipeline.measure, pipeline.probe):
        with pytest.raises(InvalidArgument, match=r"an earlier step failed \(OSError: the disk is gone\)"):
            call(batch)
    raise ArithmeticError("all of it was seen")


@pytest.mark.parametrize("where", ["F", "I"])
def test_a_stage_fails(where: str) -> None:
    ranks = Ranks(2)
    try:
        with pytest.raises(RankFailed) as caught:
            ranks.run(failing, where)
        said = str(caught.value)
        assert "rank 0: no answer" in said or "rank 0:\nTraceback" in said
        assert "ArithmeticError: all of it was seen" in said
    finally:
        ranks.stop()


def test_names_are_public() -> None:
    assert stowplan.InvalidArgument is InvalidArgument
