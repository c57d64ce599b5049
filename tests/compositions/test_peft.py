"""PEFT's LoRA models, unmodified: dropout, a frozen base, adapters that are switched, scaled, merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import stowplan
from tests import models
from tests.compositions.loops import NUM_STEPS, assert_moved, assert_same, plan_for, steps, text_batch, tight

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SHAPE = {"batch": 2, "sequence": 96}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def lora() -> Any:
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    base = models.llama()
    model = get_peft_model(base, config)
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    return model.train()


@pytest.mark.parametrize("seed", range(4))
def test_random_plans(seed: int) -> None:
    model = lora()
    with stowplan.apply(plan_for(lora, seed), model) as handle:
        seen = steps(model)
    assert_same(seen, steps(lora()))
    assert_moved(handle)


def test_wrap_plans_a_lora_model() -> None:
    model = stowplan.wrap(lora(), budget=tight(plan_for(lora, **SHAPE)))
    assert_same(steps(model, **SHAPE), steps(lora(), **SHAPE))
    assert_moved(stowplan.applied(model))


def test_a_frozen_base_saves_what_adapters_need_and_counts_their_gradients_alone() -> None:
    tuned, whole = plan_for(lora).step, plan_for(models.llama).step
    trained = sum(p.nbytes for p in lora().base_model.model.model.layers[1].parameters() if p.requires_grad)
    assert tuned.program_of(1).gradient_bytes == trained
    assert trained < whole.program_of(1).gradient_bytes / 4
    saved = {tuned.program_of(1).values[i].name for i in tuned.program_of(1).saved}
    assert not any(name.startswith("self_attn.o_proj") for name in saved)  # frozen and without an adapter


def switched(model: Any, switch: Callable[[Any, int], object]) -> list[torch.Tensor]:
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[torch.Tensor] = []
    for step in range(2 * NUM_STEPS):
        switch(model, step)
        loss = model(**text_batch(step)).loss
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def by_turns(model: Any, step: int) -> None:
    model.set_adapter(("default", "other")[step // 2 % 2])


def scaled(model: Any, step: int) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 1.0 if step < NUM_STEPS else 0.25)


def evaluated_while_disabled(model: Any, step: int) -> None:
    with model.disable_adapter(), torch.no_grad():
        model(**text_batch(90 + step))


def merged_for_evaluation(model: Any, step: int) -> None:
    model.eval()
    model.merge_adapter()
    with torch.no_grad():
        model(**text_batch(90 + step))
    model.unmerge_adapter()
    model.train()


@pytest.mark.parametrize("switch", [by_turns, scaled, evaluated_while_disabled, merged_for_evaluation])
@pytest.mark.parametrize("seed", range(2))
def test_adapters_that_change_between_steps(seed: int, switch: Callable[[Any, int], object]) -> None:
    model = lora()
    with stowplan.apply(plan_for(lora, seed), model) as handle:
        seen = switched(model, switch)
    assert_same(seen, switched(lora(), switch))
    assert_moved(handle)
