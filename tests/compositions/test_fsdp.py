"""FSDP2's fully_shard: gathered parameters come and go around a block's forward and backward, replays included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

import stowplan
from stowplan.offload.storages import storage_bytes
from tests import models
from tests.compositions.loops import NUM_STEPS, assert_moved, assert_same, plan_for, steps, text_batch, tight
from tests.distributed import Ranks

SHAPE = {"batch": 2, "sequence": 128}
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def half() -> torch.nn.Module:
    return models.llama().bfloat16()


def shard(model: Any, blocks: bool = True, **options: Any) -> Any:
    for block in model.model.layers if blocks else ():
        fully_shard(block, **options)
    return fully_shard(model, **options)


WAYS: list[dict[str, Any]] = [
    {"reshard_after_forward": True},
    {"reshard_after_forward": False},
    {"blocks": False},
    {"mp_policy": HALF},
]


def ways_of_sharding(rank: int) -> None:
    for seed, options in enumerate(WAYS):
        build = half if "mp_policy" in options else models.llama
        expected = steps(shard(models.llama(), **options), rank=rank)
        model = models.llama()
        if seed % 2:
            shard(model, **options)
        with stowplan.apply(plan_for(build, seed=seed), model) as handle:
            if not seed % 2:
                shard(model, **options)
            assert_same(steps(model, rank=rank), expected)
        assert_moved(handle)


def test_a_plan_of_the_whole_model_on_the_sharded_one(ranks: Ranks) -> None:
    ranks.run(ways_of_sharding)


def accumulating(rank: int) -> None:
    def train(plan: stowplan.Plan | None) -> list[torch.Tensor]:
        model = shard(models.llama())
        handle = None if plan is None else stowplan.apply(plan, model)

        def micro_batches(step: int) -> None:
            model.set_requires_gradient_sync(False)
            model(**text_batch(100 + step, rank)).loss.backward()
            model.set_requires_gradient_sync(True)

        seen = steps(model, rank=rank, before_step=micro_batches)
        if handle is not None:
            assert_moved(handle)
        return seen

    assert_same(train(plan_for(seed=8)), train(None))


def test_accumulation(ranks: Ranks) -> None:
    ranks.run(accumulating)


def gathered_bytes(rank: int) -> None:
    """Between forward and backward a plan keeps no gathered parameter alive, though its replay will start from some."""

    def alive(planned: bool) -> int:
        model = shard(models.llama(), reshard_after_forward=True)
        gathered: list[torch.Tensor] = []
        for block in model.model.layers:
            block.mlp.up_proj.register_forward_hook(lambda m, args, out: gathered.append(m.weight.detach()))
        if planned:
            stowplan.apply(plan_for(seed=1), model)
        for step in range(NUM_STEPS - 1):
            model(**text_batch(step, rank)).loss.backward()
        gathered.clear()
        loss = model(**text_batch(0, rank)).loss
        assert len(gathered) == len(model.model.layers)
        num_bytes = sum(weight.untyped_storage().nbytes() for weight in gathered)
        loss.backward()
        return num_bytes

    assert alive(planned=True) == alive(planned=False)


def test_gathered_parameters_are_not_kept_for_the_replay(ranks: Ranks) -> None:
    ranks.run(gathered_bytes)


def planning_sharded(rank: int) -> None:
    whole = stowplan.plan(models.llama(), text_batch(0, rank, **SHAPE), budget="1GiB", host_budget="1GiB")
    expected = steps(shard(models.llama()), rank=rank, **SHAPE)
    model = shard(models.llama())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plan = stowplan.plan(model, text_batch(0, rank, **SHAPE), budget="1GiB", host_budget="1GiB", optimizer=optimizer)
    assert plan.model == "LlamaForCausalLM"
    assert plan.step.program_of(0).name == "LlamaDecoderLayer"
    own = storage_bytes(model.parameters())
    assert plan.step.parameter_bytes == own
    assert own < whole.step.parameter_bytes * 0.6
    assert own * 2 <= plan.step.optimizer_bytes < own * 2.1
    assert plan.step.program_of(0).gradient_bytes < whole.step.program_of(0).gradient_bytes * 0.6
    names = [{value.name for value in p.step.program_of(0).values if value.actions} for p in (plan, whole)]
    assert names[0] == names[1]
    tighter = stowplan.replan(plan, budget=tight(plan))
    with stowplan.apply(tighter, model) as handle:
        assert_same(steps(model, optimizer=optimizer, rank=rank, **SHAPE), expected)
    assert_moved(handle)


def test_planning_a_sharded_model_counts_this_process(ranks: Ranks) -> None:
    ranks.run(planning_sharded)


def wrapping_sharded(rank: int) -> None:
    expected = steps(shard(models.llama()), rank=rank, **SHAPE)
    model = shard(models.llama())
    budget = tight(stowplan.plan(model, text_batch(0, rank, **SHAPE), budget="1GiB", host_budget="1GiB"))
    stowplan.wrap(model, budget=budget)
    assert_same(steps(model, rank=rank, **SHAPE), expected)
    handle = stowplan.applied(model)
    assert_moved(handle)
    longer = text_batch(0, rank, batch=2, sequence=160)
    if rank == 0:  # one process alone must not plan: the others do not take part in its collectives
        with pytest.warns(RuntimeWarning, match="larger batch than was planned for"):
            model(**longer).loss.backward()
    else:
        model(**text_batch(0, rank, **SHAPE)).loss.backward()
    assert stowplan.applied(model) is handle
    handle.remove()
    assert not any("stowplan" in hook.__module__ for hook in model._forward_pre_hooks.values())
    late = stowplan.wrap(models.llama(), budget=budget)
    shard(late)
    with pytest.raises(stowplan.InvalidArgument, match="call it before"):
        late(**text_batch(0, rank))


def test_wrapping_a_sharded_model(ranks: Ranks) -> None:
    ranks.run(wrapping_sharded)


def refusals(rank: int) -> None:
    model = models.llama()
    for block in model.model.layers:
        fully_shard(block.mlp)
        fully_shard(block)
    with pytest.raises(stowplan.UnsupportedModel, match=r"fully_shard was called on parts of model\.layers\.0"):
        stowplan.apply(plan_for(), model)
    model = models.llama()
    with stowplan.apply(plan_for(), model):
        fully_shard(model.model.layers[0].mlp)
        with pytest.raises(stowplan.UnsupportedModel, match=r"fully_shard was called on parts of model\.layers\.0"):
            model(**text_batch(0))
    first = FullyShardedDataParallel(models.llama(), device_id=torch.device("cpu"))
    for verb in (lambda: stowplan.plan(first, text_batch(0)), lambda: stowplan.wrap(first)):
        with pytest.raises(stowplan.UnsupportedModel, match="use FSDP2"):
            verb()


def test_the_first_fsdp_and_shards_inside_blocks_are_refused(ranks: Ranks) -> None:
    ranks.run(refusals)
