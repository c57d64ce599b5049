"""Models that a plan cannot honour are refused with what to change, before and during their first step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import stowplan
from stowplan.core.errors import UnsupportedModel
from tests import models
from tests.offload.toys import (
    NUM_RECORDINGS,
    WIDTH,
    Stack,
    call_toy,
    feed_forward,
    put_under_plan,
    rows,
    stack,
)

# torch's own, as its compiler is imported
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::FutureWarning")

reentrant = pytest.mark.parametrize("use_reentrant", [False, True])


def plan_for(model: Any) -> stowplan.Plan:
    x = rows().requires_grad_()  # or reentrant checkpoints have no backward
    return stowplan.plan(model, x, budget="1GiB", loss_fn=lambda output, batch: output.square().mean())


def compiled_call(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compiled_whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


compiled = pytest.mark.parametrize("compile_", [compiled_call, compiled_whole, compiled_forward])


# ---- torch.compile ---------------------------------------------------------------------------------------------------
@compiled
@pytest.mark.parametrize("verb", ["plan", "apply", "wrap"])
def test_a_compiled_model_is_refused(verb: str, compile_: Callable[[Any], Any]) -> None:
    model = stack(feed_forward)
    plan = plan_for(model)
    low = stowplan.replan(plan, budget=plan.least_budget_bytes)
    model = compile_(model)
    verbs: dict[str, Callable[[], Any]] = {
        "plan": lambda: plan_for(model),
        "apply": lambda: stowplan.apply(low, model),
        "wrap": lambda: stowplan.wrap(model),
    }
    wrong = "plan was made for" if verb == "apply" and compile_ is compiled_whole else "is compiled by torch.compile"
    with pytest.raises((UnsupportedModel, stowplan.PlanMismatch), match=wrong):
        verbs[verb]()
    assert stowplan.applied(model) is None


@compiled
def test_compiled_blocks_are_refused(compile_: Callable[[Any], Any]) -> None:
    model = stack(feed_forward)
    model.blocks[1] = compile_(model.blocks[1])
    with pytest.raises(UnsupportedModel, match=r"^blocks\.1 is compiled by torch\.compile"):
        plan_for(model)  # the like of it are planned, so it is meant, too


@pytest.mark.parametrize("num_calls_before", [0, NUM_RECORDINGS - 1])
@pytest.mark.parametrize("compile_", [compiled_call, compiled_whole])
def test_compiling_around_planned_blocks_is_refused(compile_: Callable[[Any], Any], num_calls_before: int) -> None:
    model = put_under_plan(stack(feed_forward), "recompute", call_toy).model
    for _ in range(num_calls_before):
        model(rows()).sum().backward()
    around = compile_(model)
    with pytest.raises(UnsupportedModel, match=r"^blocks\.0 is called by code that torch\.compile compiled"):
        around(rows())
    torch._dynamo.reset()


def test_compiling_around_a_planned_llama_is_refused() -> None:
    model = models.llama(2)
    batch = models.batch_for(0)
    roomy = stowplan.plan(model, batch, budget="1GiB", host_budget="1GiB")
    plan = stowplan.replan(roomy, budget=roomy.least_budget_bytes)
    with stowplan.apply(plan, model), pytest.raises(UnsupportedModel, match=r"code that torch\.compile compiled"):
        torch.compile(model, backend="eager")(**batch)
    torch._dynamo.reset()


# ---- checkpoints -----------------------------------------------------------------------------------------------------
class ChecksOutside(Stack):
    """Checkpoints every block by hand, as training scripts do."""

    use_reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def _checks_inside(block: Any, x: torch.Tensor) -> torch.Tensor:
    inner = checkpoint(lambda y: block.first(y).sin().exp(), x, use_reentrant=block.unseen["reentrant"])
    return block.second(inner.tanh()) + x


@reentrant
def test_a_model_that_checkpoints_its_blocks_is_refused_when_planning(use_reentrant: bool) -> None:
    model = ChecksOutside(feed_forward)
    model.use_reentrant = use_reentrant
    with pytest.raises(UnsupportedModel, match=r"ToyBlock .*checkpoint.*call the block without the checkpoint"):
        plan_for(model)


@reentrant
@pytest.mark.parametrize("num_calls_before", [0, NUM_RECORDINGS - 1, NUM_RECORDINGS])
def test_a_checkpoint_put_around_planned_blocks_is_refused(num_calls_before: int, use_reentrant: bool) -> None:
    if use_reentrant and num_calls_before == NUM_RECORDINGS:
        pytest.skip("runs without gradients in forward, and follows the tape in backward: exact")
    model = put_under_plan(stack(feed_forward), "recompute", call_toy).model
    for _ in range(num_calls_before):
        model(rows()).sum().backward()
    model.__class__ = ChecksOutside
    model.use_reentrant = use_reentrant

    def step() -> None:
        model(rows().requires_grad_()).sum().backward()

    with pytest.raises(UnsupportedModel, match=r"^blocks\.\d is called by a checkpoint"):
        step()


@reentrant
def test_a_checkpoint_inside_a_block_is_refused(use_reentrant: bool) -> None:
    model = stack(_checks_inside)
    for block in model.blocks:
        block.unseen["reentrant"] = use_reentrant
    with pytest.raises(UnsupportedModel, match=r"ToyBlock checkpoints a part of itself \(torch\.utils\.checkpoint\)"):
        plan_for(model)


@reentrant
def test_gradient_checkpointing_of_hugging_face(use_reentrant: bool) -> None:
    """Off when planned, switched on afterwards."""
    model = models.llama(2)
    batch = models.batch_for(0)
    roomy = stowplan.plan(model, batch, budget="1GiB", host_budget="1GiB")
    plan = stowplan.replan(roomy, budget=roomy.least_budget_bytes)
    with stowplan.apply(plan, model):
        for _ in range(NUM_RECORDINGS + 1):
            model(**batch).loss.backward()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with pytest.raises(UnsupportedModel, match=r"^model\.layers\.\d .*checkpoint.*_disable\(\)"):
            model(**batch).loss.backward()
    with pytest.raises(UnsupportedModel, match=r"gradient_checkpointing_disable\(\)"):
        stowplan.plan(model, batch, budget="1GiB")


def test_a_checkpoint_elsewhere_in_the_model_is_none_of_our_business() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack(feed_forward)
            self.head = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.head, self.stack(x), use_reentrant=False)

    torch.manual_seed(0)
    model = Head()
    plan = plan_for(model)
    plain = copy.deepcopy(model)
    x = rows()
    with stowplan.apply(stowplan.replan(plan, budget=plan.least_budget_bytes), model):
        for net in (model, plain):
            net(x).square().mean().backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(a.grad is b.grad is None or torch.equal(a.grad, b.grad) for a, b in pairs)


# ---- others ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_calls_before", [0, NUM_RECORDINGS])
def test_hooks_for_saved_tensors_around_the_model_are_refused(num_calls_before: int) -> None:
    model = put_under_plan(stack(feed_forward), "recompute", call_toy).model
    for _ in range(num_calls_before):
        model(rows()).sum().backward()
    with (
        torch.autograd.graph.save_on_cpu(),
        pytest.raises(UnsupportedModel, match=r"^blocks\.0 is called under .*saved_tensors_hooks of torch\.autograd"),
    ):
        model(rows())
    model(rows()).sum().backward()


def test_flex_attention_is_refused() -> None:
    model = models.llama()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModel, match=r"layers\.0 computes FlexAttention.*attn_implementation='sdpa'"):
        stowplan.plan(model, models.batch_for(0), budget="1GiB")


def test_data_parallel_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="use DistributedDataParallel"):
        plan_for(nn.DataParallel(stack(feed_forward)))
