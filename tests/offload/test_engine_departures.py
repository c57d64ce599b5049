"""Blocks that do not do the same every time: departures, other numbers, and blocks that are left alone for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    NUM_RECORDINGS,
    NUM_STEPS,
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

MAX_RECORDINGS, MAX_SIGNATURES = 6, 32  # a block that takes more is left alone
F, T = False, True


# ---- departures ----------------------------------------------------------------------------------------------------
def branching(block: Any, x: torch.Tensor) -> torch.Tensor:
    return _branch(block, x, block.unseen.get("wide", False))


def _branch(block: Any, x: torch.Tensor, wide: bool) -> torch.Tensor:
    hidden = functional.dropout(block.first(x), 0.3)
    if wide:
        hidden = torch.cat([hidden, hidden.sin()], -1).tanh()[:, WIDTH // 2 : -WIDTH // 2]
    return block.second(hidden.tanh()) + x


def _train_branching(model: Any, wide: Sequence[bool]) -> Tensors:
    found: Tensors = []
    for is_wide in wide:
        model.blocks[1].unseen["wide"] = is_wide
        model(rows()).square().mean().backward()
        found += [*gradients(model), torch.rand(1)]
    return found


@all_policies
@pytest.mark.parametrize("first", [False, True])
def test_a_block_that_departs_from_its_tape(first: bool, policy: str) -> None:
    """Whoever departs is recorded anew, until two recordings agree again."""
    phases = [first, not first, first]
    turns = [wide for wide in phases for _ in range(NUM_RECORDINGS + 1)]

    def make() -> Any:
        model = stack(branching)
        model.blocks[1].unseen["wide"] = first
        return model

    planned = assert_exact(make, lambda model: _train_branching(model, turns), policy, call_toy)
    counters = planned.engine.counters
    num_recorded = (2 + len(phases)) * NUM_RECORDINGS
    assert counters.departures == len(phases) - 1
    assert counters.recorded_calls == num_recorded
    assert counters.steady_calls == 3 * len(turns) - num_recorded


def shifted(block: Any, x: torch.Tensor, changed: bool) -> torch.Tensor:
    """Other rows of one storage: the same shape at another offset."""
    hidden = torch.exp(torch.cat([block.first(x), block.second(x)]) * 0.1)
    part = hidden[ROWS:] if changed else hidden[:ROWS]
    return block.second(part * part.sin()) + x


def exchanged(block: Any, x: torch.Tensor, changed: bool) -> torch.Tensor:
    """Another tensor of the same shape, which is saved as well."""
    one, other = block.first(x).tanh(), block.second(x).sigmoid()
    return one * (other if changed else one) + other.sin() + x


@pytest.mark.parametrize("body", [shifted, exchanged])
@all_policies
def test_other_tensors_of_the_same_shapes(policy: str, body: Callable[[Any, torch.Tensor, bool], torch.Tensor]) -> None:
    def train(model: Any) -> Tensors:
        found: Tensors = []
        for changed in [F] * NUM_STEPS + [T] * NUM_STEPS:
            for block in model.blocks:
                block.unseen["changed"] = changed
            found += train_toy(model, 1)
        return found

    def look(block: Any, x: torch.Tensor) -> torch.Tensor:
        return body(block, x, block.unseen.get("changed", False))

    planned = assert_exact(lambda: stack(look), train, policy, call_toy)
    assert planned.engine.counters.departures > 0


@all_policies
def test_recordings_that_disagree_are_made_until_two_agree(policy: str) -> None:
    turns = [F, T, F, F, F, F]
    planned = assert_exact(lambda: stack(branching), lambda model: _train_branching(model, turns), policy, call_toy)
    counters = planned.engine.counters
    num_recorded = 2 * NUM_RECORDINGS + 2 + NUM_RECORDINGS
    assert counters.departures == 0
    assert counters.recorded_calls == num_recorded
    assert counters.steady_calls == 3 * len(turns) - num_recorded


@all_policies
@pytest.mark.parametrize(
    ("turns", "num_departures"),
    [
        pytest.param([F, T, F, T, F, T, F, T, T, T], 0, id="no two recordings agree"),
        pytest.param([F, F, T, T, F, F, T, T, T, F], 3, id="departing over and over"),
        pytest.param([F, F, F, T, T, T, F, F, F, T, T, F], 3, id="departing from what was followed"),
    ],
)
def test_a_block_that_is_never_the_same_is_kept_with_a_warning(
    turns: list[bool], num_departures: int, policy: str
) -> None:
    plain_model = stack(branching)
    torch.manual_seed(1)
    expected = [*_train_branching(plain_model, turns), torch.get_rng_state()]
    planned = put_under_plan(stack(branching), policy, call_toy)
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match=r"^blocks\.1 keeps everything it saves: .*\(7 recordings") as warned:
        found = [*_train_branching(planned.model, turns), torch.get_rng_state()]
    assert_same(found, expected)
    assert len(warned) == 1
    counters = planned.engine.counters
    assert counters.departures == num_departures
    assert counters.recorded_calls == 2 * NUM_RECORDINGS + MAX_RECORDINGS + 1
    assert planned.slab.used_bytes == 0


@all_policies
def test_freezing_and_unfreezing_midway(policy: str) -> None:
    """Other tensors are saved: what is trained is part of the signature. The model fills a cache meanwhile."""

    def train(model: Any) -> Tensors:
        for step in range(3 * (NUM_RECORDINGS + 1)):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(step // (NUM_RECORDINGS + 1) != 1 or "q_proj" in name)
            model(**tokens(step)).loss.backward()
        return gradients(model)

    planned = assert_exact(make_llama, train, policy, lambda model: model(**tokens(0)))
    assert planned.engine.counters.departures == 0


def _branching_batch_norm(block: Any, x: torch.Tensor) -> torch.Tensor:
    return branching(block, block.norm(x))


@all_policies
def test_departing_does_not_count_a_batch_twice(policy: str) -> None:
    """The block is run again from its start; running statistics must not notice."""
    turns = [F] * NUM_RECORDINGS + [T] * (NUM_RECORDINGS + 1)
    planned = assert_exact(
        lambda: stack(_branching_batch_norm), lambda model: _train_branching(model, turns), policy, call_toy
    )
    assert planned.engine.counters.departures == 1


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
@pytest.mark.parametrize("turns", [[F] * NUM_STEPS, [F] * NUM_RECORDINGS + [T] * NUM_STEPS])
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


# ---- numbers of the block ------------------------------------------------------------------------------------------
def _annealed_dropout(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(functional.dropout(block.first(x), block.rate).tanh()) + x


def _annealed_scale(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(torch.sin(block.first(x) * block.rate)) + x


def _flagged(block: Any, x: torch.Tensor) -> torch.Tensor:
    return _branch(block, x, wide=block.rate < 0.5)


def _make_annealed(body: Body) -> Any:
    model = stack(body)
    for block in model.blocks:
        block.rate = 0.5
    return model


@all_policies
@pytest.mark.parametrize("body", [_annealed_dropout, _annealed_scale, _flagged])
def test_a_number_of_the_block_that_changes_between_steps(body: Body, policy: str) -> None:
    """The same tensors in the same shapes, made with another number; or quite other ones. Each has its own tape."""
    rates = [0.5, 0.4, 0.3]

    def train(model: Any) -> Tensors:
        for rate in rates * NUM_STEPS:
            for block in model.blocks:
                block.rate = rate
            model(rows()).square().mean().backward()
        return gradients(model)

    planned = assert_exact(lambda: _make_annealed(body), train, policy, call_toy)
    num_ways = len(planned.engine.blocks) * len(rates)
    counters = planned.engine.counters
    assert counters.departures == 0
    assert counters.recorded_calls == num_ways * NUM_RECORDINGS
    assert counters.steady_calls == num_ways * (NUM_STEPS - NUM_RECORDINGS)


def _scaled_if_at_all(block: Any, x: torch.Tensor) -> torch.Tensor:
    rate = getattr(block, "rate", None)
    return block.second(torch.sin(block.first(x) * (1.0 if rate is None else rate))) + x


@all_policies
@pytest.mark.parametrize("before", ["None", "not there"])
def test_a_number_that_the_block_got_after_planning(before: str, policy: str) -> None:
    def make() -> Any:
        model = stack(_scaled_if_at_all)
        if before == "None":
            model.blocks[1].rate = None
        return model

    def train(model: Any) -> Tensors:
        found: Tensors = []
        for rate in [0.5, 0.4]:
            model.blocks[1].rate = rate
            for _ in range(NUM_RECORDINGS + 1):
                model(rows()).square().mean().backward()
                found += gradients(model)
        return found

    assert_exact(make, train, policy, call_toy)


@all_policies
@pytest.mark.parametrize("body", [_annealed_dropout, _annealed_scale])
def test_a_block_that_is_called_in_ever_new_ways_stays_under_the_plan_with_a_warning(body: Body, policy: str) -> None:
    new_rates = [0.5 - step / 100 for step in range(1, MAX_SIGNATURES + 4)]

    def train(model: Any) -> Tensors:
        found: Tensors = []
        for rate in [*[0.5] * NUM_RECORDINGS, *new_rates, new_rates[0], 0.5]:
            model.blocks[1].rate = rate
            loss = model(rows()).square().mean()
            loss.backward()
            found += [loss.detach(), *gradients(model)]
        return found

    plain_model = _make_annealed(body)
    torch.manual_seed(1)
    expected = [*train(plain_model), torch.get_rng_state()]
    planned = put_under_plan(_make_annealed(body), policy, call_toy)
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match=r"^blocks\.1 was called in more than 32 ways") as warned:
        found = [*train(planned.model), torch.get_rng_state()]
    assert_same(found, expected)
    assert planned.engine.counters.departures == 0
    assert planned.slab.used_bytes == 0
    # Only the other blocks have calls that follow a tape; the ways that are forgotten are recorded anew.
    num_calls = NUM_RECORDINGS + len(new_rates) + 2
    (crowded,) = [block for block in planned.engine.blocks if block.name == "blocks.1"]
    assert planned.engine.counters.recorded_calls == 2 * NUM_RECORDINGS + num_calls
    assert len(crowded.tapes) == len(crowded.num_recordings) == MAX_SIGNATURES
    assert len(warned) == 1


# ---- what only some calls do ---------------------------------------------------------------------------------------
def _same_noise_every_step(block: Any, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(block, "noise"):
        block.noise = torch.randn(ROWS, WIDTH)
    return block.second((block.first(x) * block.noise).tanh()) + x


@all_policies
def test_what_the_first_call_makes_for_all_later_ones(policy: str) -> None:
    def train(model: Any) -> Tensors:
        for _ in range(NUM_STEPS + 1):
            model(rows()).square().mean().backward()
        return gradients(model)

    planned = assert_exact(lambda: stack(_same_noise_every_step), train, policy, call_toy)
    counters = planned.engine.counters
    num_recorded = 3 * (1 + NUM_RECORDINGS)
    num_steady = 3 * (NUM_STEPS + 1) - num_recorded
    assert (counters.recorded_calls, counters.steady_calls, counters.departures) == (num_recorded, num_steady, 0)


def _picks_rows(block: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = block.first(x).tanh()
    picked = (hidden.sum(-1) > 0).nonzero()[:, 0]
    return x.index_add(0, picked, block.second(hidden[picked].sin()))


@all_policies
def test_what_comes_before_an_op_that_depends_on_data_is_planned(policy: str) -> None:
    """As many rows are picked as the data has it, another number at every step; what comes after is kept."""
    numbers: set[int] = set()

    def train(model: Any) -> Tensors:
        found = []
        for step in range(2 * NUM_STEPS):
            model.zero_grad()
            x = rows() + (step - NUM_STEPS) / 4
            numbers.add(int((model.blocks[0].first(x).tanh().sum(-1) > 0).sum()))
            model(x).square().mean().backward()
            found += gradients(model)
        return found

    planned = assert_exact(lambda: stack(_picks_rows), train, policy, call_toy)
    assert len(numbers) > 2
    assert {action for actions in planned.decisions for action in actions.values()} >= set(POLICIES[policy])
    counters = planned.engine.counters
    assert counters.recorded_calls == 3 * NUM_RECORDINGS
    assert counters.departures == 0
    assert counters.steady_calls == 3 * (2 * NUM_STEPS - NUM_RECORDINGS)
    assert counters.swapped_bytes + counters.recomputed_bytes > 0


def _depends_at_once(block: Any, x: torch.Tensor) -> torch.Tensor:
    picked = (x.detach().sum(-1) > 0).nonzero()[:, 0]
    return x.index_add(0, picked, block.second(block.first(x[picked]).sin()))


@all_policies
def test_a_block_that_depends_on_data_from_its_start_is_kept_with_a_warning(policy: str) -> None:
    plain_model = stack(_depends_at_once)
    torch.manual_seed(1)
    expected = train_toy(plain_model)
    model = stack(_depends_at_once)
    slab = HostSlab(SLAB_BYTES)
    names = block_names(model)
    decisions = [{"anything": POLICIES[policy][0]}] * 3
    engine = Engine(model, [Block(name, model.get_submodule(name)) for name in names], decisions, PlainCopies(slab))
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match=r"^blocks\.\d keeps everything it saves: nonzero depends on data") as found:
        assert_same(train_toy(model), expected)
    assert len(found) == len(names)
    assert engine.counters == Counters(recorded_calls=3)


# ---- several streams ------------------------------------------------------------------------------------------------
@all_policies
def test_a_block_that_uses_several_streams_is_left_alone(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made on another stream would be read before it is there: nothing of such a block is moved."""
    side, current = [0], [0]
    monkeypatch.setattr("stowplan.offload.tape.record.current_stream", lambda device: current[0])

    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = block.first(x).tanh()
        current[0] = side[0]
        hidden = block.second(hidden)
        current[0] = 0
        return hidden + x

    def make() -> Any:
        side[0] = 0  # until the plan is there
        return stack(body)

    def train(model: Any) -> Tensors:
        side[0] = 1
        return train_toy(model)

    with pytest.warns(RuntimeWarning, match="keeps everything it saves: it runs on several streams"):
        assert_exact(make, train, policy, call_toy)
