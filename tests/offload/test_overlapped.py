"""Copies beside compute: exact whatever the delays, and every wait of the protocol is needed."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stowplan.offload.blocks import Block
from stowplan.offload.copies import HostCopy, OverlappedCopies
from stowplan.offload.copies.lanes import Pairs, ThreadLanes
from stowplan.offload.engine import Engine
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.tape.run import Run
from tests.offload import toys
from tests.offload.races import WatchedCopies
from tests.offload.toys import (
    KEEP,
    NUM_STEPS,
    Tensors,
    assert_same,
    call_language_model,
    call_toy,
    collector_off,
    feed_forward,
    gradients,
    make_gpt2,
    num_alive,
    rows,
    stack,
    tokens,
    with_dropout,
)

windows = pytest.mark.parametrize("window", [1, 2, 3])
MakeCopies = Callable[[HostSlab], OverlappedCopies]

WAITS = [
    "_lane_waits_for_values",
    "_lane_waits_for_reads",
    "_compute_waits_for_departures",
    "_lane_waits_for_buffers",
    "_compute_waits_for_arrivals",
    "_compute_waits_for_abandoned",
]


def late(seed: int) -> Callable[[Pairs], None]:
    """Poison what is about to be written, sleep for a while: who reads too early gets numbers that are none."""
    draw = random.Random(seed)

    def before(pairs: Pairs) -> None:
        for destination, _ in pairs:
            destination.fill_(0xFF)
        if draw.random() < 0.5:
            time.sleep(draw.random() * 0.003)

    return before


def always_late(pairs: Pairs) -> None:
    """As ``late``, and longer than a step of the tiny model takes on a busy machine."""
    for destination, _ in pairs:
        destination.fill_(0xFF)
    time.sleep(0.15)


def delayed(window: int, seed: int = 0) -> MakeCopies:
    def make(slab: HostSlab) -> OverlappedCopies:
        return OverlappedCopies(slab, ThreadLanes(late(seed), late(seed + 1)), window)

    return make


def watched(window: int) -> MakeCopies:
    return lambda slab: WatchedCopies(slab, window)


def copies_of(planned: Any) -> Any:
    return planned.engine.blocks[0].copies


# ---- what training does --------------------------------------------------------------------------------------------
def interleaved(model: Any) -> Tensors:
    """F0 F1 B0 F2 B1 F3 B2 B3, as a pipeline's stage does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found: Tensors = []
    for step in range(3):
        optimizer.zero_grad()
        losses = []
        for micro_batch in range(5):
            if micro_batch < 4:
                losses.append(model(**tokens(4 * step + micro_batch), use_cache=False).loss)
            if micro_batch:
                loss = losses[micro_batch - 1]
                loss.backward()
                found.append(loss.detach())
        found += gradients(model)
        optimizer.step()
    return found


def accumulating(model: Any) -> Tensors:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found: Tensors = []
    for step in range(4):
        optimizer.zero_grad()
        for micro_batch in range(2):
            loss = model(**tokens(2 * step + micro_batch), use_cache=False).loss
            loss.backward()
            found.append(loss.detach())
        found += gradients(model)
        optimizer.step()
    return found


def retaining(model: Any) -> Tensors:
    for step in range(NUM_STEPS):
        loss = model(**tokens(step), use_cache=False).loss
        loss.backward(retain_graph=True)
        loss.backward()
    return gradients(model)


def in_parts(model: Any) -> Tensors:
    """A part of a graph, a forward in between, the rest of it; and graphs that nobody goes back through."""
    last = [model.transformer.h[1].mlp.c_fc.weight]  # the block before it is on its way back then
    for step in range(2 * NUM_STEPS):
        loss = model(**tokens(step), use_cache=False).loss
        loss.backward(inputs=last, retain_graph=step % 3 != 2)
        other = model(**tokens(100 + step), use_cache=False).loss
        if step % 3 != 2:
            loss.backward()
        if step % 3 != 1:
            other.backward()
        model(**tokens(200 + step), use_cache=False)
    return gradients(model)


TRAININGS: dict[str, Callable[[Any], Tensors]] = {
    "interleaved": interleaved,
    "accumulating": accumulating,
    "retaining": retaining,
    "in parts": in_parts,
}
_expected: dict[str, Tensors] = {}


def train_under(make_copies: MakeCopies, training: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The planned model after the training, and what the training gave."""
    monkeypatch.setattr(toys, "make_copies", make_copies)
    planned = toys.put_under_plan(make_gpt2(), policy, call_language_model)
    torch.manual_seed(1)
    return planned, TRAININGS[training](planned.model)


def expected_of(training: str) -> Tensors:
    if training not in _expected:
        model = make_gpt2()
        torch.manual_seed(1)
        _expected[training] = TRAININGS[training](model)
    return _expected[training]


@windows
@pytest.mark.parametrize("policy", ["swap", "mixed"])
@pytest.mark.parametrize("training", TRAININGS)
def test_delays_change_no_bit(training: str, policy: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, found = train_under(delayed(window, seed=window), training, policy, monkeypatch)
    assert_same(found, expected_of(training))
    assert planned.slab.used_bytes == 0
    assert planned.slab.overflow_bytes == 0


@windows
@pytest.mark.parametrize("policy", ["swap", "mixed"])
@pytest.mark.parametrize("training", TRAININGS)
def test_every_access_is_in_order(training: str, policy: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, found = train_under(watched(window), training, policy, monkeypatch)
    assert_same(found, expected_of(training))
    assert copies_of(planned).races == []


@pytest.mark.parametrize("wait", WAITS)
def test_without_any_one_wait_there_is_a_race(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OverlappedCopies, wait, lambda self, *args: None)
    planned, _ = train_under(watched(2), "in parts", "swap", monkeypatch)
    assert copies_of(planned).races != []


def test_all_waits_are_known() -> None:
    assert {name for name in vars(OverlappedCopies) if "_waits_for_" in name} == set(WAITS)


@pytest.mark.parametrize("wait", [wait for wait in WAITS if wait.endswith(("reads", "departures", "arrivals"))])
def test_without_a_wait_gradients_are_wrong(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the watch calls a race is one: a lane that is surely late spoils values."""
    monkeypatch.setattr(OverlappedCopies, wait, lambda self, *args: None)
    slow = "to host" if wait.endswith("departures") else "to device"

    def make(slab: HostSlab) -> OverlappedCopies:
        lanes = {name: always_late if name == slow else late(0) for name in ("to host", "to device")}
        return OverlappedCopies(slab, ThreadLanes(lanes["to host"], lanes["to device"]), 2)

    _, found = train_under(make, "in parts", "swap", monkeypatch)
    assert any(not torch.equal(a, b) for a, b in zip(found, expected_of("in parts"), strict=True))


def test_a_value_changed_in_place_while_it_leaves_is_refused_as_autograd_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(toys, "make_copies", delayed(2))
    planned = toys.put_under_plan(stack(lambda block, x: torch.sigmoid(block.first(x))), "swap", call_toy)
    for _ in range(NUM_STEPS):
        planned.model(rows()).sum().backward()
    output = planned.model(rows())
    with torch.no_grad():
        output.mul_(0.5)  # what the last block saved, and what has not left the device yet
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# ---- what nobody comes back for ------------------------------------------------------------------------------------
@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toys, "make_copies", delayed(2))


@pytest.mark.usefixtures("delays")
@pytest.mark.parametrize("policy", ["swap", "mixed"])
def test_nothing_grows_in_two_hundred_steps(policy: str) -> None:
    """With passes that break off, graphs that are dropped, and partial backwards; by references alone."""
    planned = toys.put_under_plan(stack(breaking, num_blocks=5), policy, call_toy)
    model = planned.model
    alive = []
    with collector_off():
        for step in range(200):
            model.blocks[3].unseen["breaks"] = step % 5 == 4
            try:
                loss = model(rows()).square().mean()
            except Broken:
                continue
            if step % 5 == 0:
                loss.backward()
            if step % 5 == 1:
                torch.autograd.grad(loss, [model.blocks[3].first.weight])
            if step % 5 == 2:
                loss.backward(retain_graph=True)
                loss.backward()
            del loss
            model.zero_grad()
            if step % 5 == 0:
                alive.append((num_alive(torch.Tensor), num_alive(Run, HostCopy), planned.slab.used_bytes))
    assert alive[2:] == [(alive[2][0], 0, 0)] * 38
    assert planned.slab.overflow_bytes == 0
    assert planned.engine.counters.departures == 0


class Broken(Exception):
    """Raised in the middle of a forward."""


def breaking(block: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.nn.functional.gelu(block.first(x))
    if block.unseen.get("breaks"):
        raise Broken
    return block.second(hidden.sin()) + x


@pytest.mark.usefixtures("delays")
@pytest.mark.parametrize("policy", ["swap", "mixed"])
def test_errors_do_no_harm_to_later_steps(policy: str) -> None:
    def train(model: Any) -> Tensors:
        found: Tensors = []
        for step in range(NUM_STEPS + 3):
            model.zero_grad()
            model.blocks[2].unseen["breaks"] = step % 3 == 2
            try:
                model(rows()).square().mean().backward()
            except Broken:
                assert step % 3 == 2
            else:
                found += gradients(model)
        return found

    toys.assert_exact(lambda: stack(breaking, num_blocks=4), train, policy, call_toy)


@pytest.mark.usefixtures("delays")
def test_threads_end_when_the_plan_is_removed() -> None:
    def lanes() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name in ("to host", "to device")}

    before = lanes()
    planned = toys.put_under_plan(stack(feed_forward, num_blocks=4), "swap", call_toy)
    planned.model(rows()).sum().backward()
    started = lanes() - before
    assert len(started) == 2
    loss = planned.model(rows()).sum()
    planned.engine.remove()
    del planned
    loss.backward()  # graphs already made stay valid
    del loss
    gc.collect()
    for thread in started:
        thread.join(30)
    assert not lanes() & started


@pytest.mark.usefixtures("delays")
def test_blocks_called_several_times_in_a_forward_pass() -> None:
    class Repeating(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(toys.ToyBlock(with_dropout) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                for block in self.blocks:
                    x = block(x)
            return x

    def make() -> Any:
        torch.manual_seed(0)
        return Repeating()

    decisions = toys.decide(make(), ["blocks.0", "blocks.1"], "swap", call_toy)
    plain, model, slab = make(), make(), HostSlab(toys.SLAB_BYTES)
    blocks = [Block(f"blocks.{i % 2}", model.blocks[i % 2]) for i in range(6)]
    engine = Engine(model, blocks, [decisions[i % 2] for i in range(6)], delayed(2)(slab))
    torch.manual_seed(1)
    expected = toys.train_toy(plain, 5)
    torch.manual_seed(1)
    assert_same(toys.train_toy(model, 5), expected)
    assert engine.counters.returned_bytes * 6 == engine.counters.swapped_bytes * 4  # the last two stay
    assert slab.used_bytes == 0


def test_blocks_that_keep_everything_between_those_that_swap() -> None:
    """They let go of what is due, and have what is next come back, in the order of the plan."""
    for window in (1, 2, 3):
        model, plain = (stack(feed_forward, num_blocks=6) for _ in range(2))
        names = toys.block_names(model)
        (swapping, *_) = toys.decide(model, names, "swap", call_toy)
        decisions = [swapping if i in (0, 3) else dict.fromkeys(swapping, KEEP) for i in range(6)]
        slab = HostSlab(toys.SLAB_BYTES)
        copies = WatchedCopies(slab, window)
        blocks = [Block(name, model.get_submodule(name)) for name in names]
        engine = Engine(model, blocks, decisions, copies)
        hooked = {i for i, block in enumerate(model.blocks) if "forward" in block.__dict__}
        assert hooked == {i for i in range(6) if any(0 <= i - j <= window for j in (0, 3))}
        torch.manual_seed(1)
        expected = toys.train_toy(plain)
        torch.manual_seed(1)
        assert_same(toys.train_toy(model), expected)
        assert copies.races == []
        stays = 3 + window > 5  # the window reaches beyond the last block
        assert engine.counters.returned_bytes * (2 if stays else 1) == engine.counters.swapped_bytes
