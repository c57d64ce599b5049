"""Autocast with a gradient scaler, clipping, accumulation, and optimizers that step inside backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import stowplan
from tests import models
from tests.compositions.loops import NUM_STEPS, assert_moved, assert_same, plan_for, text_batch

Train = Callable[[Any], list[torch.Tensor]]
seeds = pytest.mark.parametrize("seed", range(3))


def check(train: Train, seed: int, build: Callable[[], Any] = models.gpt2, dtype: torch.dtype | None = None) -> None:
    """The loop under a plan with random decisions against the loop without one."""
    model = build()
    with stowplan.apply(plan_for(build, seed, dtype), model) as handle:
        seen = train(model)
    assert_same(seen, train(build()))
    assert_moved(handle)


def scaled(model: Any) -> list[torch.Tensor]:
    """Half precision with a scaler, two micro-batches a step, clipping; the second step overflows and is skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7)
    seen: list[torch.Tensor] = []
    for step in range(NUM_STEPS + 1):
        for micro in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**text_batch(2 * step + micro)).loss / 2
            if step == 1:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        seen.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        seen += [p.grad.nan_to_num(7.0) for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append(torch.tensor(scaler.get_scale()))
        seen += [p.detach().clone() for p in model.parameters()]
    norms = seen[:: 2 + 2 * len(list(model.parameters()))]
    assert [bool(norm.isfinite()) for norm in norms] == [True, False, True, True, True]
    return [tensor.nan_to_num(7.0) for tensor in seen]


@seeds
def test_a_scaler_with_accumulation_clipping_and_a_skipped_step(seed: int) -> None:
    check(scaled, seed, dtype=torch.bfloat16)


def stepping_in_backward(model: Any) -> list[torch.Tensor]:
    """Each parameter has an optimizer of its own, which steps as soon as its gradient is there."""
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    hooks = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    torch.manual_seed(7)
    seen: list[torch.Tensor] = []
    for number in range(NUM_STEPS):
        loss = model(**text_batch(number)).loss
        loss.backward()
        seen += [loss.detach(), *(p.detach().clone() for p in model.parameters())]
    for hook in hooks:
        hook.remove()
    return seen


@seeds
def test_optimizers_that_step_in_backward(seed: int) -> None:
    check(stepping_in_backward, seed, models.llama)


def hooked(model: Any) -> list[torch.Tensor]:
    """Hooks on parameters and on a block's module change gradients on their way."""
    seen: list[torch.Tensor] = []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    for block in model.model.layers:
        block.mlp.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
    for number in range(NUM_STEPS):
        model.zero_grad()
        loss = model(**text_batch(number)).loss
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    return seen


@seeds
def test_hooks_on_gradients(seed: int) -> None:
    check(hooked, seed, models.llama)
