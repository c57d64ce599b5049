"""Gradients of a stage on two data-parallel ranks are those of one process with both ranks' data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import stowplan
from stowplan.runtime.pipeline import data_parallel
from stowplan.runtime.pipeline.clipping import clip_grad_norm_
from stowplan.runtime.pipeline.data_parallel import AllReduce, Reduction, ShardedStage, reduction_of
from stowplan.runtime.pipeline.deferred import PendingGradients, WeightGradients
from tests import models
from tests.distributed import Ranks

NUM_MICROBATCHES = 3
RELATIVE = 1e-6


def stage() -> Any:
    """Llama's blocks, as a stage in the middle has them."""
    return models.llama().model  # type: ignore[union-attr]


def microbatch(step: int, number: int, rank: int) -> dict[str, Any]:
    seed = (step * NUM_MICROBATCHES + number) * 2 + rank
    generator = torch.Generator().manual_seed(seed)
    return {"inputs_embeds": torch.randn(2, 8, 32, generator=generator), "use_cache": False}


def loss_of(model: nn.Module, step: int, number: int, rank: int) -> torch.Tensor:
    return model(**microbatch(step, number, rank)).last_hidden_state.square().mean()


def joint(num_ranks: int, steps: int, build: Callable[[], Any] = stage) -> dict[str, torch.Tensor]:
    """One process: the mean over ranks of the gradients of all steps' microbatches."""
    model = build()
    for step in range(steps):
        for number in range(NUM_MICROBATCHES):
            for rank in range(num_ranks):
                (loss_of(model, step, number, rank) / num_ranks).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def pipeline_step(model: nn.Module, reduction: Reduction, deferred: WeightGradients, step: int, sync: bool) -> None:
    """F0 F1 I0 F2 I1 W0 I2 W2 W1, or without deferring the same."""
    reduction.prepare(sync=sync)
    losses: dict[str, torch.Tensor] = {}
    pending: dict[str, PendingGradients] = {}
    for action, number in ["F0", "F1", "I0", "F2", "I1", "W0", "I2", "W2", "W1"]:
        if action == "F":
            losses[number] = loss_of(model, step, int(number), dist.get_rank())
        elif action == "I":
            losses.pop(number).backward()
            pending[number] = deferred.collect()
        else:
            pending.pop(number).run()
            reduction.accumulate()
    reduction.reduce()
    reduction.finish()


def full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_close(model: nn.Module, expected: dict[str, torch.Tensor], relative: float = RELATIVE) -> None:
    seen = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert seen.keys() == expected.keys()
    for name, truth in expected.items():
        error = (seen[name] - truth).abs().max() / truth.abs().max()
        assert error <= relative, f"{name}: {error:.1e}"


def shard(model: Any, **options: Any) -> Any:
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


WAYS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda model: model,
    "sharded": lambda model: shard(model, reshard_after_forward=False),
    "sharded anew": lambda model: shard(model, reshard_after_forward=True),
    "sharded at once": lambda model: fully_shard(model, reshard_after_forward=False),
}


def steps_of(rank: int, way: str, defer: bool, install_first: bool) -> None:
    model, deferred = stage(), WeightGradients()
    if defer and install_first:
        deferred.install(model)
    model = WAYS[way](model)
    if defer and not install_first:
        deferred.install(model)
    assert deferred.num_deferred == (3 * 7 if defer else 0)
    reduction = reduction_of(model, None)
    assert isinstance(reduction, AllReduce if way == "whole" else ShardedStage)
    for _ in range(2):  # the second one shows what the first one leaves behind
        pipeline_step(model, reduction, deferred, step=0, sync=True)
        assert_close(model, joint(2, steps=1))
        model.zero_grad()
        pipeline_step(model, reduction, deferred, step=0, sync=False)
        pipeline_step(model, reduction, deferred, step=1, sync=True)
        assert_close(model, joint(2, steps=2))
        model.zero_grad()


@pytest.mark.parametrize("defer", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_one_stage_on_two_ranks(ranks: Ranks, way: str, defer: bool) -> None:
    ranks.run(steps_of, way, defer, True)


def test_deferring_after_sharding(ranks: Ranks) -> None:
    ranks.run(steps_of, "sharded", True, False)


def same_data(rank: int) -> None:
    """If both ranks have the same data, the mean is each one's gradient, bit for bit."""
    for make in WAYS.values():
        model, deferred = stage(), WeightGradients()
        deferred.install(model)
        model = make(model)
        reduction = reduction_of(model, None)
        reduction.prepare()
        alone = stage()
        for number in range(NUM_MICROBATCHES):
            for module in (alone, model):
                loss_of(module, 0, number, rank=0).backward()
            deferred.collect().run()
            reduction.accumulate()
        reduction.reduce()
        reduction.finish()
        for parameter, truth in zip(model.parameters(), alone.parameters(), strict=True):
            assert (parameter.grad is None) == (truth.grad is None)
            if truth.grad is not None:
                assert torch.equal(full(parameter.grad), truth.grad)


def test_the_mean_of_equal_gradients_is_bitwise(ranks: Ranks) -> None:
    ranks.run(same_data)


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def mixed_precision(rank: int) -> None:
    """Gradients of bf16 parameters are added up in float32, as FSDP2 does without deferring: bit for bit."""

    def gradients(defer: bool) -> list[torch.Tensor]:
        model, deferred = shard(stage(), mp_policy=HALF, reshard_after_forward=False), WeightGradients()
        if defer:
            deferred.install(model)
        reduction = ShardedStage(model)
        reduction.prepare()
        losses = [loss_of(model, 0, number, rank) for number in range(NUM_MICROBATCHES)]
        pending = []
        for loss in losses:
            loss.backward()
            pending.append(deferred.collect())
        for one in pending:
            one.run()
            reduction.accumulate()
        reduction.reduce()
        reduction.finish()
        return [full(p.grad) for p in model.parameters() if p.grad is not None]

    for mine, truth in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(mine, truth)


def test_mixed_precision_of_fsdp2(ranks: Ranks) -> None:
    ranks.run(mixed_precision)


class Experts(nn.Module):
    """Parts for one rank each, for both, for none; one that is frozen, and one too large to be reduced with others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.both, self.none, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.large = nn.Linear(4, data_parallel._ALONE_BYTES // 16)
        self.turned = nn.Parameter(torch.randn(3, 4).t())

    def forward(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        return self.large(self.frozen(self.both(self.own[rank](x)) @ self.turned @ self.turned.t())).square().mean()


def missing_gradients(rank: int) -> None:
    def x(step: int, rank: int) -> torch.Tensor:
        return torch.randn(5, 4, generator=torch.Generator().manual_seed(2 * step + rank))

    model, truth = Experts(), Experts()
    reduction = AllReduce(model)
    for step in range(2):
        model.zero_grad()
        truth.zero_grad()
        reduction.prepare()
        model(x(step, rank), rank).backward()
        assert model.own[1 - rank].weight.grad is None
        reduction.reduce()
        reduction.finish()
        for other in range(2):
            (truth(x(step, other), other) / 2).backward()
        assert_close(model, {n: p.grad for n, p in truth.named_parameters() if p.grad is not None})
        assert model.none.weight.grad is None
        assert model.frozen.weight.grad is None


def test_gradients_that_some_ranks_lack(ranks: Ranks) -> None:
    ranks.run(missing_gradients)


def refusals(rank: int) -> None:
    for wrapped in (
        DistributedDataParallel(nn.Linear(4, 4)),
        nn.Sequential(DistributedDataParallel(nn.Linear(4, 4))),
        FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu")),
    ):
        with pytest.raises(
            stowplan.UnsupportedModel, match=r"is wrapped by \w+DataParallel, which reduces gradients in"
        ):
            reduction_of(wrapped, None)
    model = stage()
    for layer in model.layers:
        fully_shard(layer)
    with pytest.raises(stowplan.UnsupportedModel, match=r"embed_tokens\.weight is outside of them"):
        reduction_of(model, None)
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (2,))))
    with pytest.raises(stowplan.UnsupportedModel, match="weight is a distributed tensor"):
        reduction_of(layer, None)
    embedding = nn.Embedding(4, 4, sparse=True)
    reduction = reduction_of(embedding, None)
    reduction.prepare()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(stowplan.UnsupportedModel, match="sparse=False"):
        reduction.reduce()


def test_what_would_be_silently_wrong_is_refused(ranks: Ranks) -> None:
    ranks.run(refusals)


def test_a_torch_without_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FSDPModule, "_get_fsdp_state")

    class Pretended(nn.Linear, FSDPModule):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return nn.Linear.__new__(cls)

    with pytest.raises(stowplan.MissingDependency, match=r"tested with torch 2\.13"):
        ShardedStage(Pretended(2, 2))


def clipping_shards(rank: int) -> None:
    for way in ("sharded", "sharded at once"):
        model = WAYS[way](stage())
        reduction = reduction_of(model, None)
        reduction.prepare()
        loss_of(model, 0, 0, rank).backward()
        reduction.accumulate()
        reduction.reduce()
        reduction.finish()
        truth = stage()
        for other in range(2):
            (loss_of(truth, 0, 0, other) / 2).backward()
        expected = torch.nn.utils.clip_grad_norm_(truth.parameters(), 0.1)
        total = clip_grad_norm_(model.parameters(), 0.1)
        torch.testing.assert_close(total, expected, rtol=RELATIVE, atol=0)
        assert_close(model, {n: p.grad for n, p in truth.named_parameters() if p.grad is not None})


def test_clipping_over_shards(ranks: Ranks) -> None:
    ranks.run(clipping_shards)
