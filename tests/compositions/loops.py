"""What the compositions share: real text as tokens, a training loop, and plans with random decisions."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch

import stowplan
from stowplan.offload.parallel import local_part
from tests import models
from tests.plans import random_decisions

__all__ = ["assert_moved", "assert_same", "plan_for", "steps", "text_batch", "tight"]

# Two recordings of every kind of call, then steps that follow the tape.
NUM_STEPS = 4


@cache
def _text() -> torch.Tensor:
    return torch.tensor(list(inspect.getsource(argparse).encode()), dtype=torch.long) % models.VOCABULARY


def text_batch(step: int, rank: int = 0, batch: int = 2, sequence: int = 24) -> dict[str, Any]:
    """Tokens of the standard library's sources, other ones for each step and rank."""
    start = (step * 7 + rank) * batch * sequence
    ids = _text()[start : start + batch * sequence].view(batch, sequence)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


@cache
def plan_for(
    build: Callable[[], torch.nn.Module] = models.llama, seed: int = 0, dtype: torch.dtype | None = None, **batch: int
) -> stowplan.Plan:
    """A plan for what ``build`` gives, with random decisions; ``dtype`` is that of autocast."""
    return random_decisions(_captured(build, dtype, **batch), seed)


@cache
def _captured(build: Callable[[], torch.nn.Module], dtype: torch.dtype | None, **batch: int) -> stowplan.Plan:
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        return stowplan.plan(build(), text_batch(0, **batch), budget="1GiB", host_budget="1GiB")


def tight(plan: stowplan.Plan) -> int:
    """A budget in bytes that cannot be met by keeping everything."""
    return (plan.unplanned.peak_bytes + plan.least_budget_bytes) // 2


def steps(
    model: torch.nn.Module,
    call: Callable[..., Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    rank: int = 0,
    num_steps: int = NUM_STEPS,
    before_step: Callable[[int], object] = lambda step: None,
    **batch: int,
) -> list[torch.Tensor]:
    """Train; everything that must not differ: losses, this process's gradients and parameters, the generator."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7 + rank)
    seen: list[torch.Tensor] = []
    for step in range(num_steps):
        before_step(step)
        loss = (call or model)(**text_batch(step, rank, **batch)).loss
        loss.backward()
        seen.append(loss.detach().clone())
        seen += _clones(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *_clones(model.parameters()), torch.rand(1)]


def _clones(tensors: Iterable[Any]) -> list[torch.Tensor]:
    return [local_part(tensor).detach().clone() for tensor in tensors]


def assert_same(seen: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Bit for bit."""
    assert len(seen) == len(expected)
    differing = [i for i, (a, b) in enumerate(zip(seen, expected, strict=True)) if not torch.equal(a, b)]
    assert not differing, f"{len(differing)} of {len(seen)} tensors differ, the first is number {differing[0]}"


def assert_moved(handle: stowplan.AppliedPlan | None) -> None:
    """The plan has recomputed or swapped something in steps that were not recorded."""
    assert handle is not None
    assert handle.counters.swapped_bytes + handle.counters.recomputed_bytes > 0
    assert handle.counters.steady_calls > 0
    assert handle.counters.departures == 0
