"""Hugging Face's Trainer and Accelerate, unmodified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import Trainer, TrainingArguments

import stowplan
from tests import models
from tests.compositions.loops import NUM_STEPS, assert_moved, assert_same, plan_for, text_batch, tight

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory:UserWarning"
)

SHAPE = {"batch": 2, "sequence": 96}


@pytest.fixture(autouse=True)
def _no_accelerator() -> Iterator[None]:
    """Accelerate's settings are global to the process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def examples(first: int, num: int) -> list[dict[str, torch.Tensor]]:
    batches = [text_batch(first + i, batch=1, sequence=SHAPE["sequence"]) for i in range(num)]
    return [{"input_ids": batch["input_ids"][0], "labels": batch["labels"][0]} for batch in batches]


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": True,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    arguments = TrainingArguments(**settings | options)
    return Trainer(model=model, args=arguments, train_dataset=examples(0, 24), eval_dataset=examples(50, 2))


def outcome(run: Trainer) -> list[torch.Tensor]:
    """Losses of steps and evaluations, and the parameters at the end."""
    logged = [log[key] for log in run.state.log_history for key in ("loss", "eval_loss", "grad_norm") if key in log]
    assert len(logged) >= 2 * 6
    return [torch.tensor(logged, dtype=torch.float64), *(p.detach().clone() for p in run.model.parameters())]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    run = trainer(models.gpt2(), tmp_path_factory.mktemp("plain"))
    run.train()
    return outcome(run)


def test_a_wrapped_model_trains_evaluates_saves_and_resumes(plain: list[torch.Tensor], tmp_path: Path) -> None:
    plan = plan_for(models.gpt2, dtype=torch.bfloat16, **SHAPE)
    run = trainer(stowplan.wrap(models.gpt2(), budget=tight(plan)), tmp_path)
    run.train()
    assert_same(outcome(run), plain)
    assert_moved(stowplan.applied(run.model))

    again = trainer(stowplan.wrap(models.gpt2(), budget=tight(plan)), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(outcome(again), plain)
    assert_moved(stowplan.applied(again.model))


@pytest.mark.parametrize("seed", range(2))
def test_an_applied_plan(plain: list[torch.Tensor], tmp_path: Path, seed: int) -> None:
    model = models.gpt2()
    with stowplan.apply(plan_for(models.gpt2, seed, torch.bfloat16, **SHAPE), model) as handle:
        run = trainer(model, tmp_path)
        run.train()
        run.save_model(str(tmp_path / "saved"))
        assert_same(outcome(run), plain)
    assert_moved(handle)
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert_same(list(loaded.parameters()), list(model.parameters()))


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("verb", ["apply", "wrap"])
def test_gradient_checkpointing_in_the_arguments_says_how_to_turn_it_off(verb: str, name: str, tmp_path: Path) -> None:
    model = models.llama()
    if verb == "wrap":
        stowplan.wrap(model, budget="1GiB")
    else:
        stowplan.apply(plan_for(**SHAPE), model)
    with pytest.raises(stowplan.UnsupportedModel, match=rf"{name}=True .*TrainingArguments"):
        trainer(model, tmp_path, bf16=False, **{name: True}).train()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("order", ["wrap, prepare", "prepare, wrap", "prepare, apply"])
def test_accelerate(precision: str, order: str) -> None:
    plan = plan_for(models.llama, 1, torch.bfloat16 if precision == "bf16" else None, **SHAPE)

    def train(order: str) -> tuple[list[torch.Tensor], stowplan.AppliedPlan | None]:
        accelerator = Accelerator(mixed_precision=precision, cpu=True)
        model: Any = models.llama()
        if order == "wrap, prepare":
            stowplan.wrap(model, budget=tight(plan))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        if order == "prepare, wrap":
            stowplan.wrap(model, budget=tight(plan))
        elif order == "prepare, apply":
            stowplan.apply(plan, model)
        seen: list[torch.Tensor] = []
        for step in range(NUM_STEPS):
            loss = model(**text_batch(step, **SHAPE)).loss
            accelerator.backward(loss)
            seen.append(accelerator.clip_grad_norm_(model.parameters(), 0.5))
            seen += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
            optimizer.step()
            optimizer.zero_grad()
        handle = stowplan.applied(model)
        inner = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        with accelerator.autocast():
            seen.append(inner(**text_batch(0, **SHAPE)).loss.detach())
            if handle is not None:
                handle.remove()
                assert stowplan.applied(model) is None
            seen.append(inner(**text_batch(1, **SHAPE)).loss.detach())
        return seen, handle

    expected, _ = train("")
    seen, handle = train(order)
    assert_same(seen, expected)
    assert_moved(handle)
