"""Compositions whose path on CUDA is another one: NCCL, the side streams of FSDP2, the gradient scaler's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import stowplan
from tests import models
from tests.compositions.loops import assert_moved, assert_same, text_batch
from tests.plans import random_decisions

pytestmark = pytest.mark.gpu

SHAPE = {"batch": 2, "sequence": 128}
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process: the hooks and streams of the real thing."""
    if not torch.cuda.is_available():
        pytest.fail("the gpu tests were asked for, and there is no CUDA device")
    store = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def on_device(step: int) -> dict[str, Any]:
    batch = text_batch(step, **SHAPE)
    return {name: item.cuda() if isinstance(item, torch.Tensor) else item for name, item in batch.items()}


def train(model: Any, scaler: torch.amp.GradScaler) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7)
    seen: list[torch.Tensor] = []
    for step in range(5):
        with torch.autocast("cuda", torch.float16, enabled=scaler.is_enabled()):
            loss = model(**on_device(step)).loss
        scaler.scale(loss * (float("inf") if step == 1 and scaler.is_enabled() else 1.0)).backward()
        seen.append(loss.detach().clone())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [*seen, *(getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters())]


def build() -> Any:
    return models.llama(hidden=64).cuda()


def around(name: str, model: Any) -> Any:
    if name == "ddp":
        return DistributedDataParallel(model)
    if name.startswith("fsdp"):
        policy = {"mp_policy": HALF} if name == "fsdp-bf16" else {}
        for block in model.model.layers:
            fully_shard(block, **policy)
        fully_shard(model, **policy)
    return model


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["scaler", "ddp", "fsdp", "fsdp-bf16"])
def test_random_plans(name: str, seed: int) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=name == "scaler")

    whole = build().bfloat16() if name == "fsdp-bf16" else build()
    with torch.autocast("cuda", torch.float16, enabled=name == "scaler"):
        plan = stowplan.plan(whole, on_device(0), budget="8GiB", host_budget="1GiB")
    model = around(name, build())
    with stowplan.apply(random_decisions(plan, seed), model) as handle:
        seen = train(model, scaler())
    assert_same(seen, train(around(name, build()), scaler()))
    assert_moved(handle)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_planning_and_wrapping(name: str) -> None:
    roomy = stowplan.plan(around(name, build()), on_device(0), budget="8GiB", host_budget="1GiB")
    budget = (roomy.unplanned.peak_bytes + roomy.least_budget_bytes) // 2
    model = around(name, build())
    stowplan.wrap(model, budget=budget, host_budget="1GiB")
    off = torch.amp.GradScaler("cuda", enabled=False)
    assert_same(train(model, off), train(around(name, build()), off))
    assert stowplan.applied(model) is not None
