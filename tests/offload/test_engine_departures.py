"""Blocks that do not do the same every time: departures, other numbers, and blocks that are left alone for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from stowplan.core.errors import ReplayMismatch, UnsupportedModel
from stowplan.offload.blocks import Block
from stowplan.offload.copies import PlainCopies
from stowplan.offload.engine import Engine
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.tape.run import Counters
from tests.offload.toys import (
    POLICIES,
    ROWS,
    SLAB_BYTES,
    WIDTH,
    Body,
    Tensors,
    ToyBlock,
    all_policies,
    assert_exact,
    assert_same,
    block_names,
    call_toy,
    gradients,
    make_llama,
    put_under_plan,
    rows,
    stack,
    tokens,
    train_toy,
)


# ---- blocks that do not do the same every time ---------------------------------------------------------------------
def branching(block: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = functional.dropout(block.first(x), 0.3)
    if getattr(block, "wide", False):
        hidden = torch.cat([hidden, hidden.sin()], -1).tanh()[:, WIDTH // 2 : -WIDTH // 2]
    return block.second(hidden.tanh()) + x


def _train_branching(model: Any, wide: Sequence[bool]) -> Tensors:
    found: Tensors = []
    for is_wide in wide:
        model.blocks[1].wide = is_wide
        model(rows()).square().mean().backward()
        found += [*gradients(model), torch.rand(1)]
    return found


@all_policies
@pytest.mark.parametrize("first", [False, True])
def test_a_block_that_departs_from_its_tape(first: bool, policy: str) -> None:
    turns = [first, first, not first, not first, first, first]

    def make() -> Any:
        model = stack(branching)
        model.blocks[1].wide = first
        return model

    planned = assert_exact(make, lambda model: _train_branching(model, turns), policy, call_toy)
    counters = planned.engine.counters
    assert counters.departures == 2
    assert counters.recorded_calls == 3 + 2
    assert counters.steady_calls == 3 * 6 - 3 - 2


@all_policies
def test_a_block_that_keeps_departing_is_kept_with_a_warning(policy: str) -> None:
    turns = [False, True, False, True, False, True]
    plain_model = stack(branching)
    torch.manual_seed(1)
    expected = _train_branching(plain_model, turns)
    planned = put_under_plan(stack(branching), policy, call_toy)
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match=r"^blocks\.1 keeps everything it saves: .*\(3 times\)"):
        found = _train_branching(planned.model, turns)
    assert_same(found, expected)
    assert planned.engine.counters.departures == 3
    assert planned.slab.used_bytes == 0


@all_policies
def test_freezing_and_unfreezing_midway(policy: str) -> None:
    """Other tensors are saved, and the models' own cache is filled by a call that is then made again."""

    def train(model: Any) -> Tensors:
        for step in range(6):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(step not in (2, 3) or "q_proj" in name)
            model(**tokens(step)).loss.backward()
        return gradients(model)

    assert_exact(make_llama, train, policy, lambda model: model(**tokens(0)))


def _branching_batch_norm(block: Any, x: torch.Tensor) -> torch.Tensor:
    return branching(block, block.norm(x))


@all_policies
def test_departing_does_not_count_a_batch_twice(policy: str) -> None:
    """The block is run again from its start; running statistics must not notice."""
    turns = [False, True, True]
    assert_exact(lambda: stack(_branching_batch_norm), lambda model: _train_branching(model, turns), policy, call_toy)


class WritesItsInput(nn.Module):
    """Changes its input in place before it takes one of two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ToyBlock(_writing_its_input) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x * 1.0)
        return x


def _writing_its_input(block: Any, x: torch.Tensor) -> torch.Tensor:
    return branching(block, x.mul_(1.5))


@all_policies
@pytest.mark.parametrize("turns", [[False, False, False], [False, True, True]])
def test_a_block_that_changes_its_input_in_place(turns: list[bool], policy: str) -> None:
    """It may depart, too: then it either is exact or says that it cannot be run again, but never changes it twice."""

    def make() -> Any:
        torch.manual_seed(0)
        return WritesItsInput()

    plain_model = make()
    torch.manual_seed(1)
    expected = _train_branching(plain_model, turns)
    planned = put_under_plan(make(), policy, call_toy)
    torch.manual_seed(1)
    try:
        found = _train_branching(planned.model, turns)
    except (ReplayMismatch, UnsupportedModel):
        assert True in turns
    else:
        assert_same(found, expected)


def _annealed_dropout(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(functional.dropout(block.first(x), block.rate).tanh()) + x


def _annealed_scale(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(torch.sin(block.first(x) * block.rate)) + x


@all_policies
@pytest.mark.parametrize("body", [_annealed_dropout, _annealed_scale])
def test_a_number_of_the_block_that_changes_between_steps(body: Body, policy: str) -> None:
    """The same tensors in the same shapes, made with another number."""

    def make() -> Any:
        model = stack(body)
        for block in model.blocks:
            block.rate = 0.5
        return model

    def train(model: Any) -> Tensors:
        for step in range(4):
            for block in model.blocks:
                block.rate = 0.5 - 0.1 * step
            model(rows()).square().mean().backward()
        return gradients(model)

    assert_exact(make, train, policy, call_toy)


def _same_noise_every_step(block: Any, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(block, "noise"):
        block.noise = torch.randn(ROWS, WIDTH)
    return block.second((block.first(x) * block.noise).tanh()) + x


@all_policies
def test_what_the_first_call_makes_for_all_later_ones(policy: str) -> None:
    def train(model: Any) -> Tensors:
        for _ in range(3):
            model(rows()).square().mean().backward()
        return gradients(model)

    assert_exact(lambda: stack(_same_noise_every_step), train, policy, call_toy)


def _picks_rows(block: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = block.first(x)
    picked = (hidden.sum(-1) > 0).nonzero()[:, 0]
    return x.index_add(0, picked, block.second(hidden[picked].sin()))


@all_policies
def test_shapes_that_depend_on_data_are_kept_with_a_warning(policy: str) -> None:
    plain_model = stack(_picks_rows)
    torch.manual_seed(1)
    expected = train_toy(plain_model)
    model = stack(_picks_rows)
    slab = HostSlab(SLAB_BYTES)
    names = block_names(model)
    decisions = [{"anything": POLICIES[policy][0]}] * 3
    engine = Engine(model, [Block(name, model.get_submodule(name)) for name in names], decisions, PlainCopies(slab))
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match=r"^blocks\.\d keeps everything it saves: nonzero depends on data") as found:
        assert_same(train_toy(model), expected)
    assert len(found) == len(names)
    assert engine.counters == Counters(recorded_calls=3)
