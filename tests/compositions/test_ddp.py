"""DistributedDataParallel: before and after a plan is applied, accumulation, static graphs, unused parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import stowplan
from tests import models
from tests.compositions.loops import NUM_STEPS, assert_moved, assert_same, plan_for, steps, text_batch, tight
from tests.distributed import Ranks

OPTIONS = [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}]
SHAPE = {"batch": 2, "sequence": 128}


def plain(rank: int, **options: Any) -> list[torch.Tensor]:
    return steps(DistributedDataParallel(models.llama(), **options), rank=rank)


def orders_and_options(rank: int) -> None:
    for seed, options in enumerate(OPTIONS):
        model = models.llama()
        if seed % 2:
            handle = stowplan.apply(plan_for(seed=seed), model)
            parallel = DistributedDataParallel(model, **options)
        else:
            parallel = DistributedDataParallel(model, **options)
            handle = stowplan.apply(plan_for(seed=seed), parallel)
        assert stowplan.applied(parallel) is stowplan.applied(model) is handle
        assert_same(steps(parallel, rank=rank), plain(rank, **options))
        assert_moved(handle)
        handle.remove()
        assert "forward" not in model.model.layers[0].__dict__


def test_a_plan_on_the_model_or_on_ddp_under_its_options(ranks: Ranks) -> None:
    ranks.run(orders_and_options)


def accumulating(rank: int) -> None:
    def train(plan: stowplan.Plan | None) -> list[torch.Tensor]:
        parallel = DistributedDataParallel(models.llama())
        handle = None if plan is None else stowplan.apply(plan, parallel)
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
        seen: list[torch.Tensor] = []
        for step in range(NUM_STEPS):
            with parallel.no_sync():
                for micro in range(2):
                    parallel(**text_batch(3 * step + micro, rank)).loss.backward()
            loss = parallel(**text_batch(3 * step + 2, rank)).loss
            loss.backward()
            seen += [loss.detach(), *(p.grad.clone() for p in parallel.parameters())]
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            assert_moved(handle)
        return seen

    expected = train(None)
    for seed in range(3):
        assert_same(train(plan_for(seed=seed)), expected)


def test_accumulation_without_reduction(ranks: Ranks) -> None:
    ranks.run(accumulating)


def skips_a_block(rank: int) -> None:
    """Another block is left out at each step, which DDP must be told of."""

    def train(planned: bool) -> list[torch.Tensor]:
        model = models.llama()
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        layers = list(model.model.layers)
        if planned:
            stowplan.apply(plan_for(seed=5), parallel)

        def leave_out(step: int) -> None:
            model.model.layers = torch.nn.ModuleList(layers[: 2 + step % 2])
            model.model.config.num_hidden_layers = 2 + step % 2

        return steps(parallel, rank=rank, before_step=leave_out)

    assert_same(train(planned=True), train(planned=False))


def test_parameters_that_a_step_does_not_use(ranks: Ranks) -> None:
    ranks.run(skips_a_block)


def planning_on_ddp(rank: int) -> None:
    model = models.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    alone = stowplan.plan(model, text_batch(0, rank, **SHAPE), budget="1GiB", optimizer=optimizer)
    gradients = sum(p.nbytes for p in model.parameters())
    for options in OPTIONS[1], OPTIONS[3]:
        parallel = DistributedDataParallel(models.llama(), **options)
        plan = stowplan.plan(parallel, text_batch(0, rank, **SHAPE), budget="1GiB")
        held = gradients if "gradient_as_bucket_view" in options else 0
        assert plan.step.block_names == alone.step.block_names
        assert plan.step.buffer_bytes == alone.step.buffer_bytes + gradients - held
        assert plan.step.held_gradient_bytes == held
        assert plan.model == "LlamaForCausalLM"
        expected = plain(rank, **options)
        with stowplan.apply(plan_for(seed=rank), parallel) as handle:  # it trains on as if nobody had planned
            assert_same(steps(parallel, rank=rank), expected)
        assert_moved(handle)


def test_planning_on_ddp_counts_its_buckets_and_leaves_no_trace(ranks: Ranks) -> None:
    ranks.run(planning_on_ddp)


def wrapping(rank: int) -> None:
    budget = tight(plan_for(batch=2, sequence=128))
    expected = steps(DistributedDataParallel(models.llama(), static_graph=True), rank=rank, **SHAPE)
    outer = DistributedDataParallel(models.llama(), static_graph=True)
    assert stowplan.wrap(outer, budget=budget + outer.module.num_parameters() * 4) is outer
    inner = stowplan.wrap(models.llama(), budget=budget)
    for parallel in (outer, DistributedDataParallel(inner, static_graph=True)):
        assert_same(steps(parallel, rank=rank, **SHAPE), expected)
        assert_moved(stowplan.applied(parallel))
    with pytest.raises(stowplan.InvalidArgument, match="already"):
        stowplan.wrap(outer.module, budget=budget)


def test_wrap_in_and_out_of_ddp(ranks: Ranks) -> None:
    ranks.run(wrapping)


def measuring(rank: int) -> None:
    parallel = DistributedDataParallel(models.llama())
    with stowplan.apply(plan_for(), parallel) as handle, stowplan.measure(parallel) as measured:
        steps(parallel, rank=rank)
    assert len(measured.measurement.step_seconds) == NUM_STEPS
    assert sum(measured.measurement.recomputed_bytes) == handle.counters.recomputed_bytes > 0


def test_measuring_ddp(ranks: Ranks) -> None:
    ranks.run(measuring)
