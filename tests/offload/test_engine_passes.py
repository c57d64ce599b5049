"""Forwards and backwards in every order that training makes them, and errors on the way.

Hard cases and where they are tested: accumulation, several forwards in flight, retained graphs, double and partial
backward, exceptions, no growth: here. In-place ops, opaque values, random ops: test_engine_ops. What is changed before
backward: test_engine_in_place. No-grad, eval: test_engine_signatures. Calls that differ: test_engine_departures.
Threads: test_engine_threads. Constants that nothing shows: test_checks.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from stowplan.offload.blocks import Block
from stowplan.offload.copies import PlainCopies
from stowplan.offload.engine import Engine
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.memory_log import memory_log
from stowplan.offload.tape.run import Cell, Run
from tests.offload.toys import (
    KEEP,
    NUM_RECORDINGS,
    NUM_STEPS,
    SLAB_BYTES,
    SWAP,
    Tensors,
    all_policies,
    assert_exact,
    assert_same,
    assert_toy_is_exact,
    block_names,
    call_language_model,
    call_toy,
    collector_off,
    decide,
    feed_forward,
    gradients,
    make_gpt2,
    make_llama,
    num_alive,
    put_under_plan,
    rows,
    stack,
    tokens,
    with_custom_function,
    with_dropout,
)


# ---- the order of forwards and backwards ---------------------------------------------------------------------------
@all_policies
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_gradient_accumulation(make: Callable[[], Any], policy: str) -> None:
    def train(model: Any) -> Tensors:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found: Tensors = []
        for step in range(3):
            optimizer.zero_grad()
            for micro_batch in range(2):
                loss = model(**tokens(2 * step + micro_batch), use_cache=False).loss / 2
                loss.backward()
                found.append(loss.detach())
            found += gradients(model)
            optimizer.step()
        return found

    planned = assert_exact(make, train, policy, call_language_model)
    counters = planned.engine.counters
    num_recorded = 3 * NUM_RECORDINGS
    num_steady = 3 * 6 - num_recorded
    assert (counters.recorded_calls, counters.steady_calls, counters.departures) == (num_recorded, num_steady, 0)
    assert bool(counters.swapped_bytes) == (policy != "recompute")
    assert bool(counters.recomputed_bytes) == (policy != "swap")


@all_policies
@pytest.mark.parametrize("first", [0, 1])
def test_two_forwards_in_flight(first: int, policy: str) -> None:
    def train(model: Any) -> Tensors:
        for step in range(3):
            losses = [model(**tokens(2 * step + i), use_cache=False).loss for i in range(2)]
            losses[first].backward()
            losses[1 - first].backward()
        return gradients(model)

    assert_exact(make_gpt2, train, policy, call_language_model)


@all_policies
def test_backward_twice_through_a_retained_graph(policy: str) -> None:
    def train(model: Any) -> Tensors:
        for step in range(NUM_STEPS):
            loss = model(**tokens(step), use_cache=False).loss
            loss.backward(retain_graph=True)
            loss.backward(retain_graph=True)
            loss.backward()
        return gradients(model)

    assert_exact(make_gpt2, train, policy, call_language_model)


@all_policies
def test_double_backward(policy: str) -> None:
    def make() -> Any:
        model = make_llama()
        model.set_attn_implementation("eager")  # the fused kernel has no second derivative
        return model

    def train(model: Any) -> Tensors:
        for step in range(NUM_STEPS):
            loss = model(**tokens(step), use_cache=False).loss
            slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            torch.stack([slope.square().sum() for slope in slopes]).sum().backward()
        found = gradients(model)
        model.zero_grad()  # breaks the circles that create_graph makes
        return found

    assert_exact(make, train, policy, call_language_model)


@all_policies
def test_optimizer_that_steps_inside_backward(policy: str) -> None:
    def train(model: Any) -> Tensors:
        def step(parameter: torch.Tensor) -> None:
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
            parameter.grad = None

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        losses = []
        for _ in range(NUM_STEPS):
            loss = model(rows()).square().mean()
            loss.backward()
            losses.append(loss.detach())
        return losses

    assert_exact(lambda: stack(feed_forward), train, policy, call_toy)


@all_policies
def test_partial_backward_and_a_dropped_graph_leave_nothing(policy: str) -> None:
    planned = put_under_plan(stack(feed_forward), policy, call_toy)
    model = planned.model
    with collector_off():
        for _ in range(NUM_STEPS):
            loss = model(rows()).square().mean()
            expected = torch.autograd.grad(loss, [model.blocks[2].first.weight], retain_graph=True)
            found = torch.autograd.grad(loss, [model.blocks[2].first.weight])
            assert_same(list(found), list(expected))
            del loss
        assert planned.slab.used_bytes == 0
        assert num_alive(Run, Cell) == 0


def _hidden_states(model: Any, step: int) -> tuple[torch.Tensor, ...]:
    outputs = model(**tokens(step), use_cache=False, output_hidden_states=True)
    return outputs.hidden_states  # type: ignore[no-any-return]


@all_policies
@pytest.mark.parametrize("order", [(1,), (3,), (1, 3), (3, 1), (2, 1, 3)])
def test_backward_from_some_of_the_outputs(order: tuple[int, ...], policy: str) -> None:
    """Later blocks do not take part, or each output has a backward of its own over what they share."""

    def train(model: Any) -> Tensors:
        found: Tensors = []
        for step in range(NUM_STEPS):
            model.zero_grad()
            states = _hidden_states(model, step)
            for number in order:
                states[number].square().mean().backward(retain_graph=number != order[-1])
            found += gradients(model)
        return found

    assert_exact(make_gpt2, train, policy, call_language_model)


@all_policies
def test_gradients_of_some_parameters(policy: str) -> None:
    """``torch.autograd.grad`` and ``backward(inputs=)`` visit a part of the graph; the rest may follow, or not."""

    def train(model: Any) -> Tensors:
        found: Tensors = []
        blocks = model.transformer.h
        for step in range(2 * NUM_STEPS):
            loss = model(**tokens(step), use_cache=False).loss
            found += torch.autograd.grad(loss, [blocks[2].mlp.c_fc.weight, blocks[2].ln_1.bias], retain_graph=True)
            loss.backward(inputs=[blocks[1].attn.c_attn.weight], retain_graph=True)
            if step % 2:
                loss.backward()
            found += gradients(model)
            model.zero_grad()
        return found

    planned = assert_exact(make_gpt2, train, policy, call_language_model)
    assert planned.slab.used_bytes == 0


@all_policies
@pytest.mark.parametrize("num_calls", [1, NUM_STEPS])
def test_a_loss_dropped_without_backward_leaves_nothing(num_calls: int, policy: str) -> None:
    planned = put_under_plan(stack(feed_forward), policy, call_toy)
    with collector_off():
        losses = [planned.model(rows()).square().mean() for _ in range(num_calls)]
        assert (planned.slab.used_bytes > 0) == (policy != "recompute")
        del losses
        assert planned.slab.used_bytes == 0
        assert num_alive(Run, Cell) == 0


@all_policies
def test_nothing_grows_in_sixty_steps(policy: str) -> None:
    planned = put_under_plan(stack(with_dropout), policy, call_toy)
    alive = []
    with collector_off():
        for _ in range(60):
            planned.model(rows()).square().mean().backward()
            planned.model.zero_grad()
            alive.append((num_alive(torch.Tensor), num_alive(Run, Cell), planned.slab.used_bytes))
    assert alive[2:] == [(alive[2][0], 0, 0)] * 58


@pytest.mark.slow
@all_policies
def test_live_bytes_do_not_grow_in_two_hundred_steps(policy: str) -> None:
    """By the allocator's own log, with all that a training loop does."""
    planned = put_under_plan(stack(with_dropout), policy, call_toy)
    model = planned.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with memory_log(torch.device("cpu")) as log:
        for step in range(200):
            log.mark("step")
            model(rows()).square().mean().backward()
            if step % 3 == 0:
                model(rows())  # a forward without a backward
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                gc.collect()
    ends = [segment.end_bytes for segment in log.segments[1:]]
    assert max(ends[100:]) == max(ends[10:100])
    assert planned.slab.used_bytes == 0
    assert planned.slab.overflow_bytes == 0


@all_policies
def test_custom_function_that_saves_its_own_output(policy: str) -> None:
    planned = assert_toy_is_exact(with_custom_function, policy)
    alive = []
    with collector_off():
        for _ in range(6):
            loss = planned.model(rows()).sum()
            del loss
            alive.append((num_alive(torch.Tensor), num_alive(Run, Cell)))
    assert alive[1:] == [alive[1]] * 5


def test_a_kept_output_of_a_custom_function_is_no_circle() -> None:
    """All but one value kept, so that the function's own output goes back to autograd."""
    model = stack(with_custom_function)
    (swapping, *_) = decide(model, block_names(model), "swap", call_toy)
    names = list(swapping)
    for swapped in names:
        twin = copy.deepcopy(model)
        decisions = [{name: SWAP if name == swapped else KEEP for name in names}] * 3
        blocks = [Block(name, twin.get_submodule(name)) for name in block_names(twin)]
        slab = HostSlab(SLAB_BYTES)
        Engine(twin, blocks, decisions, PlainCopies(slab))
        with collector_off():
            twin(rows())
            before = num_alive(torch.Tensor)
            for _ in range(4):
                twin(rows())
            assert num_alive(torch.Tensor) == before, f"with {swapped} swapped"
            assert slab.used_bytes == 0


# ---- errors on the way ---------------------------------------------------------------------------------------------
class Stumble(Exception):
    """Raised where a test wants a pass to break off."""


def stumble(*args: Any) -> None:
    raise Stumble


def stumbling(block: Any, x: torch.Tensor) -> torch.Tensor:
    where = block.unseen.get("stumbles_in")
    hidden = functional.dropout(functional.gelu(block.first(x)), 0.3)
    if where == "forward":
        stumble()
    if where == "backward":
        hidden.register_hook(stumble)
    return block.second(hidden) + x


@all_policies
@pytest.mark.parametrize("step_of_error", [0, 1, NUM_RECORDINGS])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_does_no_harm_to_later_steps(where: str, step_of_error: int, policy: str) -> None:
    def train(model: Any) -> Tensors:
        found: Tensors = []
        for step in range(NUM_STEPS + 1):
            model.zero_grad()
            model.blocks[1].unseen["stumbles_in"] = where if step == step_of_error else None
            try:
                model(rows()).square().mean().backward()
            except Stumble:
                assert step == step_of_error
            else:
                assert step != step_of_error
                found += gradients(model)
        return found

    planned = assert_exact(lambda: stack(stumbling), train, policy, call_toy)
    assert planned.engine.counters.departures == 0
