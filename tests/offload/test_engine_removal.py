"""Copies of a model under a plan, taking the plan away again, and the models and plans that are refused."""

from __future__ import annotations

import copy
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stowplan.core.errors import PlanMismatch, UnsupportedModel
from stowplan.offload.blocks import Block
from stowplan.offload.copies import PlainCopies
from stowplan.offload.engine import Engine
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.tape.run import Counters
from tests.offload.toys import (
    KEEP,
    NUM_RECORDINGS,
    RECOMPUTE,
    ROWS,
    SLAB_BYTES,
    SWAP,
    WIDTH,
    Tensors,
    all_policies,
    assert_same,
    block_names,
    call_language_model,
    call_toy,
    collector_off,
    decide,
    feed_forward,
    gradients,
    make_gpt2,
    make_llama,
    put_under_plan,
    rows,
    stack,
    train_toy,
    with_dropout,
)


# ---- copies, removal, and what must not show -----------------------------------------------------------------------
@all_policies
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_runs_its_own_parameters_without_a_plan(way: str, policy: str) -> None:
    planned = put_under_plan(stack(feed_forward), policy, call_toy)
    x = rows()
    for _ in range(NUM_RECORDINGS + 1):
        expected = planned.model(x).detach()
    twin = copy.deepcopy(planned.model) if way == "deepcopy" else pickle.loads(pickle.dumps(planned.model))
    calls_before = copy.copy(planned.engine.counters)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in planned.model.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected)
    assert planned.engine.counters == calls_before
    twin_planned = put_under_plan(twin, policy, call_toy)
    twin(x).sum().backward()
    assert twin_planned.engine.counters.recorded_calls == 3


def test_the_same_plan_on_a_copy() -> None:
    planned = put_under_plan(stack(feed_forward), "mixed", call_toy)
    twin = copy.deepcopy(planned.model)
    blocks = [Block(name, twin.get_submodule(name)) for name in block_names(twin)]
    engine = Engine(twin, blocks, planned.decisions, PlainCopies(HostSlab(SLAB_BYTES)))
    results = []
    for model in (planned.model, twin):
        torch.manual_seed(1)
        results.append(train_toy(model))
    assert_same(*results)
    assert engine.counters == planned.engine.counters


def _doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return 2 * type(self).forward(self, x)


def test_a_copy_of_a_block_with_a_forward_of_its_own() -> None:
    model = stack(feed_forward)
    model.blocks[1].forward = types.MethodType(_doubled, model.blocks[1])
    x = rows()
    expected = copy.deepcopy(model)(x)
    put_under_plan(model, "recompute", call_toy)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)


@all_policies
def test_removal_gives_forward_back(policy: str) -> None:
    model = stack(feed_forward)
    own = types.MethodType(_doubled, model.blocks[1])
    model.blocks[1].forward = own
    planned = put_under_plan(model, policy, call_toy)
    assert all("forward" in block.__dict__ for block in model.blocks)
    planned.engine.remove()
    planned.engine.remove()
    assert model.blocks[1].__dict__["forward"] is own
    assert "forward" not in model.blocks[0].__dict__
    assert "forward" not in model.blocks[2].__dict__
    x = rows()
    model(x).sum().backward()
    assert planned.engine.counters == Counters()


@all_policies
def test_graphs_made_before_removal_stay_valid(policy: str) -> None:
    def train(model: Any, remove: Callable[[], None] = lambda: None) -> Tensors:
        torch.manual_seed(1)
        losses = [model(rows()).square().mean() for _ in range(NUM_RECORDINGS + 1)]
        remove()
        for loss in losses:
            loss.backward()
        return gradients(model)

    planned = put_under_plan(stack(with_dropout), policy, call_toy)
    assert_same(train(planned.model, planned.engine.remove), train(stack(with_dropout)))
    assert planned.slab.used_bytes == 0


def test_two_engines_removed_in_either_order_leave_no_hook() -> None:
    for order in (1, -1):
        model = stack(feed_forward)
        engines = [put_under_plan(model, "swap", call_toy).engine for _ in range(2)]
        for engine in engines[::order]:
            engine.remove()
        model(rows()).sum().backward()
        assert all("forward" not in block.__dict__ for block in model.blocks)
        assert [engine.counters for engine in engines] == [Counters(), Counters()]


def test_removal_lets_the_host_memory_go() -> None:
    """Without the garbage collector: the slab may be most of the machine's memory."""
    planned = put_under_plan(stack(feed_forward), "swap", call_toy)
    for _ in range(NUM_RECORDINGS + 1):
        planned.model(rows()).sum().backward()
    model, slab = planned.model, weakref.ref(planned.slab)
    with collector_off():
        planned.engine.remove()
        del planned
        model.zero_grad()
        assert slab() is None


def test_the_module_tree_and_the_state_dict_do_not_change() -> None:
    model = make_gpt2()
    names = [name for name, _ in model.named_modules()]
    keys = list(model.state_dict())
    parameters = [name for name, _ in model.named_parameters()]
    put_under_plan(model, "mixed", call_language_model)
    for _ in range(NUM_RECORDINGS + 1):
        assert [name for name, _ in model.named_modules()] == names
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_parameters()] == parameters
        call_language_model(model).loss.backward()


def test_blocks_that_keep_everything_are_not_touched() -> None:
    model = stack(feed_forward)
    decisions = decide(model, block_names(model), "swap", call_toy)
    decisions[1] = dict.fromkeys(decisions[1], KEEP)
    decisions[2] = {}
    blocks = [Block(name, model.get_submodule(name)) for name in block_names(model)]
    engine = Engine(model, blocks, decisions, PlainCopies(HostSlab(SLAB_BYTES)))
    assert ["forward" in block.__dict__ for block in model.blocks] == [True, False, False]
    train_toy(model)
    assert engine.counters.recorded_calls == NUM_RECORDINGS


# ---- refusals and warnings -----------------------------------------------------------------------------------------
def _engine_for(model: Any) -> Engine:
    blocks = [Block(name, model.get_submodule(name)) for name in block_names(model)]
    return Engine(model, blocks, [{"x": SWAP}] * len(blocks), PlainCopies(HostSlab(1)))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, as its compiler is imported
def test_a_compiled_block_is_refused() -> None:
    model = stack(feed_forward)
    model.blocks[1].compile()
    with pytest.raises(UnsupportedModel, match=r"^blocks\.1 is compiled by torch\.compile"):
        _engine_for(model)
    model = stack(feed_forward)
    model.blocks[2] = torch.compile(model.blocks[2])
    with pytest.raises(UnsupportedModel, match=r"^blocks\.2 is compiled by torch\.compile"):
        _engine_for(model)
    model = stack(feed_forward)
    model.blocks[0].first.compile()
    with pytest.raises(UnsupportedModel, match=r"^blocks\.0 is compiled by torch\.compile"):
        _engine_for(model)


def test_a_refused_model_is_not_touched() -> None:
    model = stack(feed_forward)
    model.blocks[1].gradient_checkpointing = True
    with pytest.raises(UnsupportedModel):
        _engine_for(model)
    assert not any("forward" in block.__dict__ for block in model.blocks)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # its newer name may not be there yet
def test_gradient_checkpointing_is_refused() -> None:
    model = make_llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedModel, match=r"gradient checkpointing on.*gradient_checkpointing_disable\(\)"):
        _engine_for(model)
    model.gradient_checkpointing_disable()
    _engine_for(model).remove()


def test_a_planned_value_that_does_not_exist_is_a_mismatch() -> None:
    model = stack(feed_forward)
    decisions = decide(model, block_names(model), "swap", call_toy)
    decisions[1]["attention.softmax"] = RECOMPUTE
    blocks = [Block(name, model.get_submodule(name)) for name in block_names(model)]
    slab = HostSlab(SLAB_BYTES)
    engine = Engine(model, blocks, decisions, PlainCopies(slab))
    for _ in range(8):  # it stays an error
        with pytest.raises(PlanMismatch, match=r"^blocks\.1 saves other values.*'attention\.softmax'.*plan anew"):
            model(rows())
    engine.remove()
    model(rows()).sum().backward()


@all_policies
def test_a_host_slab_that_is_too_small_is_a_warning(policy: str) -> None:
    plain_model = stack(feed_forward)
    torch.manual_seed(1)
    expected = train_toy(plain_model)
    size_bytes = 2 * ROWS * WIDTH * torch.float32.itemsize
    planned = put_under_plan(stack(feed_forward), policy, call_toy, slab_bytes=size_bytes)
    torch.manual_seed(1)
    if policy == "recompute":
        assert_same(train_toy(planned.model), expected)
        return
    with pytest.warns(RuntimeWarning, match=f"^the host slab of {size_bytes} B is full") as found:
        assert_same(train_toy(planned.model), expected)
    assert len(found) == 1
    assert planned.slab.used_bytes == 0


@all_policies
def test_empty_batches(policy: str) -> None:
    """Values without bytes, in a slab that is full."""
    planned = put_under_plan(stack(feed_forward), policy, lambda model: model(rows(0)), slab_bytes=1)
    span = planned.slab.take(planned.slab.size_bytes)
    for _ in range(NUM_RECORDINGS + 1):
        planned.model(rows(0)).sum().backward()
    planned.slab.give_back(span)
    assert planned.slab.used_bytes == 0
