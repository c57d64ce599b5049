"""What is brought back is compared with what the forward pass had; a difference stops the step before the optimizer.

The hazard is a constant that no signature sees: here a number in a closure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stowplan.core.errors import InvalidArgument, ReplayMismatch
from stowplan.offload.blocks import Block
from stowplan.offload.copies import PlainCopies
from stowplan.offload.engine import Engine
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.tape.checks import Checks, Verify
from tests.offload.toys import (
    NUM_RECORDINGS,
    SLAB_BYTES,
    Body,
    all_policies,
    assert_same,
    block_names,
    call_toy,
    decide,
    gradients,
    rows,
    stack,
    train_toy,
    with_dropout,
)


class Knob:
    """A number that no module holds: a class attribute, as good as a global."""

    scale = 1.0
    tail = 1.0


@pytest.fixture(autouse=True)
def _knob() -> None:
    Knob.scale = Knob.tail = 1.0


def turned_by_a_knob(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(torch.sin(block.first(x) * Knob.scale)) + x


def turned_in_one_place(block: Any, x: torch.Tensor) -> torch.Tensor:
    """The knob turns one number of many."""
    hidden = torch.sin(block.first(x)).repeat(1, 16).flatten()
    hidden = torch.tanh(torch.cat([hidden[:-1], hidden[-1:] * Knob.tail]))
    return block.second(x) + hidden.view(len(x), -1, x.shape[1]).mean(1)  # nothing else is saved that knows of it


def planned(
    body: Body, verify: Verify, policy: str = "recompute", behind: bool = False, num_blocks: int = 3
) -> tuple[Any, Engine]:
    """Toy blocks under a plan. ``behind``: verdicts are read late, as on a device that runs ahead of the host."""
    model = stack(body, num_blocks)
    names = block_names(model)
    decisions = decide(model, names, policy, call_toy)
    blocks = [Block(name, model.get_submodule(name)) for name in names]
    checks = Checks(verify, runs_ahead=lambda device: behind)
    return model, Engine(model, blocks, decisions, PlainCopies(HostSlab(SLAB_BYTES)), checks=checks)


def warm_up(model: Any) -> None:
    for _ in range(NUM_RECORDINGS + 1):
        model(rows()).square().mean().backward()
    model.zero_grad()


@all_policies
@pytest.mark.parametrize("behind", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("verify", list(Verify))
def test_checks_change_nothing_and_find_nothing_where_nothing_is_wrong(
    verify: Verify, behind: bool, policy: str
) -> None:
    plain = stack(with_dropout)
    torch.manual_seed(1)
    expected = train_toy(plain)
    model, engine = planned(with_dropout, verify, policy, behind)
    torch.manual_seed(1)
    assert_same(train_toy(model), expected)
    engine.remove()


def test_without_checks_the_hazard_is_real() -> None:
    """Neither the signature nor anything else sees the knob: this is what the checks are for."""
    model, _ = planned(turned_by_a_knob, Verify.OFF)
    plain = stack(turned_by_a_knob)
    warm_up(model)
    Knob.scale = 0.5
    x = rows()
    for net in (model, plain):
        net(x).square().mean().backward()
    assert not all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(plain), strict=True))


@pytest.mark.parametrize("verify", [Verify.SAMPLE, Verify.ALL])
def test_a_failed_check_names_block_and_value_before_the_optimizer_steps(verify: Verify) -> None:
    model, _ = planned(turned_by_a_knob, verify)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warm_up(model)
    before = [p.detach().clone() for p in model.parameters()]
    Knob.scale = 0.5

    def step() -> None:
        torch.stack([model(rows()).square().mean() for _ in range(2)]).sum().backward()  # each value has its turn
        optimizer.step()

    with pytest.raises(ReplayMismatch, match=r"^'(mul|sin)' of blocks\.2 .* no optimizer has stepped"):
        step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_every_value_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many blocks as values, a count over all blocks would give each block the same value for ever."""
    compared: dict[str, set[str]] = {}

    def compare(self: Checks, witness: Any, tensor: torch.Tensor, block: str, value: str) -> None:
        compared.setdefault(block, set()).add(value)

    monkeypatch.setattr(Checks, "compare", compare)
    model, engine = planned(with_dropout, Verify.SAMPLE, num_blocks=4)
    for _ in range(12):
        model(rows()).sum().backward()
    for block in engine.blocks:
        (course,) = block.courses.values()
        assert course is not None
        assert len(course.targets) % len(engine.blocks) == 0
        assert compared[block.name] == {course.tape.values[v].name for v in course.targets}


def test_all_finds_at_once_what_samples_find_in_time() -> None:
    """One number of one value changes; samples come to it in turn."""

    def num_steps_until_told(verify: Verify) -> int:
        model, _ = planned(turned_in_one_place, verify)
        Knob.tail = 1.0
        warm_up(model)
        Knob.tail = 2.0
        for step in range(500):
            try:
                model(rows()).square().mean().backward()
            except ReplayMismatch:
                return step
        return 500

    assert num_steps_until_told(Verify.ALL) == 0
    assert 0 < num_steps_until_told(Verify.SAMPLE) < 500


@pytest.mark.parametrize("num_calls_before", range(NUM_RECORDINGS))
def test_all_holds_for_recorded_calls_too(num_calls_before: int) -> None:
    model, engine = planned(with_dropout, Verify.ALL)
    losses = [model(rows()).sum() for _ in range(num_calls_before + 1)]
    (tape,) = engine.blocks[-1].tapes.values()
    for op in tape.ops:  # the replay is written at its first use
        if op.func is torch.ops.aten.gelu.default:
            op.func = torch.ops.aten.tanh.default
    with pytest.raises(ReplayMismatch, match=r"of blocks\.2 .* not what the forward pass had"):
        losses[-1].backward()


@pytest.mark.parametrize("verify", [Verify.SAMPLE, Verify.ALL])
@pytest.mark.parametrize("who", ["optimizer", "next forward", "removal"])
def test_a_verdict_that_is_read_later_stops_the_step(who: str, verify: Verify) -> None:
    model, engine = planned(turned_by_a_knob, verify, behind=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warm_up(model)
    before = [p.detach().clone() for p in model.parameters()]
    Knob.scale = 0.5
    torch.stack([model(rows()).square().mean() for _ in range(2)]).sum().backward()  # no error yet
    ask: dict[str, Callable[[], Any]] = {
        "optimizer": optimizer.step,
        "next forward": lambda: model(rows()),
        "removal": engine.remove,
    }
    with pytest.raises(ReplayMismatch, match=r"' of blocks\.\d "):
        ask[who]()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    ask[who]()  # told once


def test_after_removal_checks_are_read_at_once() -> None:
    model, engine = planned(turned_by_a_knob, Verify.ALL, behind=True)
    warm_up(model)
    Knob.scale = 0.5
    loss = model(rows()).square().mean()
    engine.remove()
    with pytest.raises(ReplayMismatch):
        loss.backward()


def test_swapped_values_are_compared_on_demand() -> None:
    model, engine = planned(with_dropout, Verify.ALL, "swap")
    warm_up(model)
    loss = model(rows()).sum()
    engine.blocks[0].copies.slab._bytes.fill_(7)  # type: ignore[attr-defined]
    with pytest.raises(ReplayMismatch, match=r" of blocks\.2 "):
        loss.backward()


def test_an_unknown_way_to_verify() -> None:
    with pytest.raises(InvalidArgument, match="verify='some' is not known; allowed: 'off', 'sample', 'all'"):
        Verify.of("some")


@pytest.mark.parametrize("num_elements", [0, 1, 31, 4096])
@pytest.mark.parametrize("verify", list(Verify)[1:])
def test_witnesses_of_all_sizes(num_elements: int, verify: Verify) -> None:
    checks = Checks(verify)
    value = torch.arange(num_elements, dtype=torch.float32)
    for turn in range(70):
        witness = checks.witness(value, turn)
        checks.compare(witness, value, "block", "value")
        assert (witness.content.numel() > 0) == (num_elements > 0)
        assert verify is Verify.ALL or witness.content.numel() <= 130
    seen = torch.zeros(4 * num_elements, dtype=torch.uint8)
    for turn in range(200):
        checks.witness(value, turn).found(seen).fill_(1)
    assert seen.all()
