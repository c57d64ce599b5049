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

from stowplan.offload.copies import OverlappedCopies, Portion
from stowplan.offload.copies.lanes import Pairs, ThreadLanes
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.tape.run import Run
from stowplan.offload.tape.tape import Geometry
from tests.offload import toys
from tests.offload.races import WatchedCopies
from tests.offload.toys import (
    KEEP,
    NUM_STEPS,
    Tensors,
    assert_same,
    call_language_model,
    call_toy,
    feed_forward,
    gradients,
    make_gpt2,
    rows,
    stack,
    tokens,
    with_dropout,
)

windows = pytest.mark.parametrize("window", [1, 2, 3])
Engine = Callable[[HostSlab], OverlappedCopies]

WAITS = [
    "_lane_waits_for_values",
    "_lane_waits_for_reads",
    "_compute_waits_for_departures",
    "_lane_waits_for_buffers",
    "_compute_waits_for_arrivals",
    "_compute_waits_for_abandoned",
]


def late(seed: int, longest_seconds: float = 0.003) -> Callable[[Pairs], None]:
    """Poison what is about to be written, sleep for a while: who reads too early gets numbers that are none."""
    draw = random.Random(seed)

    def before(pairs: Pairs) -> None:
        for destination, _ in pairs:
            destination.fill_(0xFF)
        if draw.random() < 0.5:
            time.sleep(draw.random() * longest_seconds)

    return before


def delayed(window: int, seed: int = 0, longest_seconds: float = 0.003) -> Engine:
    def make(slab: HostSlab) -> OverlappedCopies:
        return OverlappedCopies(slab, ThreadLanes(late(seed, longest_seconds), late(seed + 1, longest_seconds)), window)

    return make


def watched(window: int) -> Engine:
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


def train_under(make_copies: Engine, training: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> Any:
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


@pytest.mark.parametrize(
    "wait", ["_lane_waits_for_reads", "_compute_waits_for_departures", "_compute_waits_for_arrivals"]
)
def test_without_a_wait_gradients_are_wrong(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the watch calls a race is one: a late lane spoils values."""
    monkeypatch.setattr(OverlappedCopies, wait, lambda self, *args: None)
    _, found = train_under(delayed(2, longest_seconds=0.03), "in parts", "swap", monkeypatch)
    assert any(not torch.equal(a, b) for a, b in zip(found, expected_of("in parts"), strict=True))
