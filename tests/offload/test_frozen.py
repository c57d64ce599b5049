"""Frozen layers and LoRA: a plan holds what plain torch holds, and nothing for parameters that are not trained."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from stowplan import session
from stowplan.core.plan import Plan
from stowplan.core.program import Action
from tests import models
from tests.offload.test_exactness import assert_same
from tests.plans import random_decisions

SHAPE = {"batch": 2, "sequence": 128}


class LoraLinear(nn.Module):
    """A frozen linear layer and a trained correction of low rank (Hu et al., arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x)) * 2.0


def half_frozen() -> nn.Module:
    """The embedding and the first two of four blocks are not trained: backward never reaches them."""
    model = models.llama(num_blocks=4, hidden=64)
    for module in (model.model.embed_tokens, *model.model.layers[:2]):
        module.requires_grad_(False)
    return model


def lora() -> nn.Module:
    """All is frozen but the corrections of the query and value projections."""
    model = models.llama(num_blocks=4, hidden=64).requires_grad_(False)
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoraLinear(layer.self_attn.q_proj)
        layer.self_attn.v_proj = LoraLinear(layer.self_attn.v_proj)
    return model


MODELS = {"half frozen": half_frozen, "lora": lora}
each_model = pytest.mark.parametrize("name", MODELS)


def planned(name: str) -> tuple[Plan, Any]:
    model = MODELS[name]()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return session.plan(model, models.batch_for(0, **SHAPE), budget="1GiB", optimizer=optimizer), model


def saved_bytes(model: nn.Module) -> list[int]:
    """Bytes that plain autograd saves in each block, parameters left out, each storage once."""
    found = []
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    shared: set[int] = set()

    def watch(layer: nn.Module) -> None:
        forward = layer.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            storages: dict[int, int] = {}
            held = []
            shared.update(t.untyped_storage()._cdata for t in kwargs["position_embeddings"])

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                held.append(tensor)
                storage = tensor.untyped_storage()
                if storage._cdata not in parameters | shared:
                    storages[storage._cdata] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = forward(*args, **kwargs)
            found.append(sum(storages.values()))
            return output

        layer.forward = call  # type: ignore[method-assign]

    for layer in model.model.layers:
        watch(layer)
    model(**models.batch_for(0, **SHAPE))
    return found


@each_model
def test_what_is_planned_is_what_torch_saves(name: str) -> None:
    plan, _ = planned(name)
    programs = [plan.step.program_of(block) for block in range(plan.step.num_blocks)]
    assert [program.saved_bytes - program.held_bytes for program in programs] == saved_bytes(MODELS[name]())
    assert all(program.held_bytes <= 64 for program in programs)  # scalars
    if name == "half frozen":
        assert [program.saved_bytes > 0 for program in programs] == [False, False, True, True]
        assert [program.gradient_bytes > 0 for program in programs] == [False, False, True, True]
        assert programs[0].backward_peak_bytes < programs[3].backward_peak_bytes / 2
    else:
        full = session.plan(models.llama(num_blocks=4, hidden=64), models.batch_for(0, **SHAPE), budget="1GiB").step
        trained = sum(4 * p.numel() for p in lora().model.layers[0].parameters() if p.requires_grad)
        assert programs[1].gradient_bytes == trained
        assert programs[1].saved_bytes < full.programs[0].saved_bytes


def peak(name: str, plan: Plan | None) -> int:
    """Highest live bytes of a steady step."""
    gc.collect()
    model = MODELS[name]()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = models.batch_for(0, **SHAPE)

    def step() -> None:
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    handle = session.apply(plan, model) if plan is not None else None
    step()
    step()
    with session.measure(model) as measured:
        step()
    if handle is not None:
        handle.remove()
    return max(measured.measurement.peak_bytes)


@each_model
def test_peaks_beside_plain_torch(name: str) -> None:
    """Keeping all takes what plain torch takes; recomputing takes what the plan says, and less than torch."""
    plan, _ = planned(name)
    plain = peak(name, None)
    assert peak(name, plan) == plain
    assert plain == pytest.approx(plan.unplanned.peak_bytes, rel=0.005)
    programs = [plan.step.program_of(block) for block in range(plan.step.num_blocks)]
    least = session.replan(plan, budget=plan.least_budget_bytes)
    assert any(action is Action.RECOMPUTE for actions in least.decisions for action in actions)
    measured = peak(name, least)
    assert measured == pytest.approx(least.prediction.peak_bytes, rel=0.005)
    assert measured < plain
    recompute_all = replace(
        plan,
        decisions=tuple(
            tuple(Action.RECOMPUTE if Action.RECOMPUTE in p.values[i].actions else Action.KEEP for i in p.saved)
            for p in programs
        ),
    )
    assert peak(name, recompute_all) < plain


@each_model
def test_bit_for_bit(name: str) -> None:
    plan, _ = planned(name)

    def train(model: nn.Module) -> list[torch.Tensor]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        seen = []
        for step in range(3):
            loss = model(**models.batch_for(step, **SHAPE)).loss
            loss.backward()
            seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            optimizer.step()
            optimizer.zero_grad()
        return [*seen, *(p.detach().clone() for p in model.parameters())]

    expected = train(MODELS[name]())
    for seed in range(4):
        model = MODELS[name]()
        with session.apply(random_decisions(plan, seed), model):
            assert_same(train(model), expected)
