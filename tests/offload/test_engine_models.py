"""Shapes of models: what is frozen, what blocks are given and give, blocks in blocks."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

import stowplan
from stowplan.core.program import Action
from stowplan.offload.arguments import flatten, map_tree
from stowplan.offload.blocks import Block
from stowplan.offload.copies import PlainCopies
from stowplan.offload.engine import Engine
from stowplan.offload.host_slab import HostSlab
from tests.offload.toys import (
    NUM_RECORDINGS,
    NUM_STEPS,
    SLAB_BYTES,
    WIDTH,
    Stack,
    Tensors,
    ToyBlock,
    all_policies,
    assert_exact,
    assert_same,
    call_language_model,
    call_toy,
    decide,
    gradients,
    make_llama,
    tokens,
    train_toy,
    with_dropout,
)


# ---- shapes of models ----------------------------------------------------------------------------------------------
@all_policies
def test_frozen_parameters(policy: str) -> None:
    def make() -> Any:
        model = make_llama()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name or "norm" in name)
        return model

    def train(model: Any) -> Tensors:
        for step in range(NUM_STEPS):
            model(**tokens(step), use_cache=False).loss.backward()
        return gradients(model)

    assert_exact(make, train, policy, call_language_model)


@all_policies
def test_an_input_that_needs_no_gradient(policy: str) -> None:
    """The first block after a frozen embedding saves less than the others."""

    def make() -> Any:
        model = make_llama()
        model.model.embed_tokens.weight.requires_grad_(False)
        return model

    def train(model: Any) -> Tensors:
        for step in range(NUM_STEPS):
            model(**tokens(step), use_cache=False).loss.backward()
        return gradients(model)

    planned = assert_exact(make, train, policy, call_language_model)
    assert planned.engine.counters.steady_calls == 3 * (NUM_STEPS - NUM_RECORDINGS)


class Pair(nn.Module):
    """Blocks that pass a tuple on, one half of it nested."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, pair: tuple[torch.Tensor, dict[str, Any]]) -> tuple[torch.Tensor, dict[str, Any]]:
            x, rest = pair
            y = self.linear(x).tanh()
            return y * rest["gate"], {"gate": y.sigmoid(), "nothing": None}

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Half() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pair = x, {"gate": x.cos(), "nothing": None}
        for block in self.blocks:
            pair = block(pair)
        return pair[0] + pair[1]["gate"]


@all_policies
def test_tuples_and_dicts_in_and_out(policy: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return Pair()

    planned = assert_exact(make, train_toy, policy, call_toy)
    assert planned.engine.counters.steady_calls == 3 * (NUM_STEPS - NUM_RECORDINGS)


@all_policies
def test_one_block_called_several_times_in_a_forward(policy: str) -> None:
    class Looped(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.detach().requires_grad_()
            for _ in range(3):
                x = self.blocks[0](x)
            return x

    def make() -> Any:
        torch.manual_seed(0)
        return Looped(with_dropout, 1)

    planned = assert_exact(make, train_toy, policy, call_toy)
    counters = planned.engine.counters
    assert (counters.recorded_calls, counters.steady_calls) == (NUM_RECORDINGS, 3 * NUM_STEPS - NUM_RECORDINGS)


class Outer(nn.Module):
    """A block inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.inner = ToyBlock(with_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(self.inner(self.before(x).tanh()).sin(), 0.1) + x


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Outer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@all_policies
def test_nested_planned_modules_are_recorded_no_more_than_others(policy: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return Nested()

    names = ["blocks.0", "blocks.1", "blocks.0.inner", "blocks.1.inner"]
    plain_model = make()
    torch.manual_seed(1)
    expected = [*train_toy(plain_model), torch.get_rng_state()]
    model = make()
    inner = decide(model, names[2:], policy, call_toy)
    outer = _decide_outer(model, names[:2], names[2:], policy)
    slab = HostSlab(SLAB_BYTES)
    blocks = [Block(name, model.get_submodule(name)) for name in names]
    engine = Engine(model, blocks, [*outer, *inner], PlainCopies(slab))
    torch.manual_seed(1)
    assert_same([*train_toy(model), torch.get_rng_state()], expected)
    assert engine.counters.recorded_calls <= NUM_RECORDINGS * len(names)
    assert engine.counters.departures == 0
    assert slab.used_bytes == 0


def _decide_outer(model: Any, outer: Sequence[str], inner: Sequence[str], policy: str) -> list[dict[str, Action]]:
    """What the outer blocks save themselves while the inner ones' values are packed by others."""
    twin = copy.deepcopy(model)
    for name in inner:
        module = twin.get_submodule(name)

        def handle(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                return forward(*args, **kwargs)

        module.forward = types.MethodType(
            lambda self, *args, _handle=handle, **kwargs: _handle(
                types.MethodType(type(self).forward, self), args, kwargs
            ),
            module,
        )
    return decide(twin, outer, policy, call_toy)


@dataclasses.dataclass
class Halves:
    """What a block may give: tensors in a dataclass, one of them nested."""

    left: torch.Tensor
    rest: dict[str, torch.Tensor]


class TakesAndGivesRecords(nn.Module):
    """Given a dataclass, gives a ModelOutput, which the next one is given as a dataclass again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, halves: Halves, scale: float = 2.0) -> BaseModelOutput:
        left = torch.tanh(self.first(halves.left)) * scale
        return BaseModelOutput(last_hidden_state=left, hidden_states=(self.second(left).sin() + halves.rest["right"],))


class OfRecords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TakesAndGivesRecords() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = Halves(x, {"right": x.cos()})
        for block in self.blocks:
            output = block(halves)
            halves = Halves(output.last_hidden_state, {"right": output.hidden_states[0]})
        return halves.left + halves.rest["right"]


@all_policies
def test_blocks_that_take_and_give_records(policy: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return OfRecords()

    planned = assert_exact(make, train_toy, policy, call_toy)
    assert any(name.startswith("halves.left") for name in planned.decisions[1])


def test_records_are_captured() -> None:
    """The parts outside the blocks find the same records, and the inputs in them are planned."""
    torch.manual_seed(0)
    model, batch = OfRecords(), torch.randn(4, WIDTH)
    plan = stowplan.plan(model, batch, budget="1GiB", loss_fn=lambda output, batch: output.square().sum())
    saved = [[value.name for value in p.values if value.saved] for p in plan.step.programs]
    assert all("first.tanh" in names or "tanh" in names for names in saved)
    model(batch).square().sum().backward()
    expected = gradients(model)
    with stowplan.apply(stowplan.replan(plan, budget=plan.least_budget_bytes), model):
        for _ in range(NUM_STEPS):
            model.zero_grad()
            model(batch).square().sum().backward()
            assert_same(gradients(model), expected)


def test_records_are_copied_only_where_they_change() -> None:
    frozen = dataclasses.make_dataclass("Frozen", ["x", "y"], frozen=True)(torch.ones(2), "kept")
    tree = {"a": [frozen, (1, 2)], "b": BaseModelOutput(last_hidden_state=torch.ones(2))}
    assert map_tree(tree, lambda leaf: leaf) is tree
    doubled = map_tree(tree, lambda leaf: leaf * 2 if isinstance(leaf, torch.Tensor) else leaf)
    assert isinstance(doubled["b"], BaseModelOutput)
    assert doubled["b"].last_hidden_state.tolist() == doubled["a"][0].x.tolist() == [2, 2]
    assert tree["b"].last_hidden_state.tolist() == frozen.x.tolist() == [1, 1]
    assert doubled["a"][1] is tree["a"][1]
    assert len(flatten((tree,), {})) == 5
