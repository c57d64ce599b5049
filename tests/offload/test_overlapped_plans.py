"""Plans with copies beside compute, on whole models: exact under any decisions, within the bytes that are predicted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from stowplan import session
from stowplan.core.plan import Decisions, Plan
from stowplan.core.program import Action
from stowplan.offload.copies import OverlappedCopies
from stowplan.offload.copies.lanes import ThreadLanes
from stowplan.planner.activations.problem import Problem
from stowplan.planner.activations.simulate import simulate
from stowplan.session import applying
from tests import models
from tests.offload.test_overlapped import late
from tests.plans import in_full

BUILDERS: dict[str, Callable[..., torch.nn.Module]] = {"llama": models.llama, "gpt2": models.gpt2}
NUM_BLOCKS = 5
WINDOWS = (1, 2, 3)
cases = pytest.mark.parametrize("name", BUILDERS)
amounts = pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
UNLIMITED = 2**40


@cache
def captured(name: str, amp: bool) -> Plan:
    """A plan whose decisions and hardware the tests replace."""
    model = BUILDERS[name](NUM_BLOCKS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        return session.plan(model, models.batch_for(0), budget="1GiB", host_budget="1GiB", optimizer=optimizer)


@cache
def plain_run(name: str, amp: bool) -> list[torch.Tensor]:
    return models.train(BUILDERS[name](NUM_BLOCKS), amp=amp, num_steps=5)


def planned(plan: Plan, window: int, decisions: Decisions) -> Plan:
    hardware = replace(plan.hardware, overlapped_copies=True, staging_blocks=window)
    problem = Problem(step=plan.step, hardware=hardware, budget_bytes=UNLIMITED, host_budget_bytes=UNLIMITED)
    return replace(plan, hardware=hardware, decisions=decisions, prediction=simulate(problem, decisions))


def drawn(plan: Plan, seed: int) -> Decisions:
    """Each block draws, or swaps all it can, or keeps all."""
    draw = random.Random(seed)

    def choose(actions: tuple[Action, ...], way: str) -> Action:
        if way == "draw":
            return draw.choice(actions)
        wanted = Action.SWAP if way == "swap" else Action.KEEP
        return wanted if wanted in actions else actions[0]

    decisions = []
    for block in range(plan.step.num_blocks):
        program = plan.step.program_of(block)
        way = draw.choice(["draw", "draw", "swap", "keep"])
        decisions.append(tuple(choose(program.values[i].actions, way) for i in program.saved))
    return tuple(decisions)


def random_plan_test(num_examples: int) -> Callable[..., None]:
    @settings(
        max_examples=num_examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        database=None,
    )
    @given(seed=st.integers(0, 2**31), window=st.sampled_from(WINDOWS))
    def test(name: str, amp: bool, seed: int, window: int) -> None:
        note(f"seed {seed}, window {window}")
        plan = planned(captured(name, amp), window, drawn(captured(name, amp), seed))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(applying, "lanes_for", lambda device: ThreadLanes(late(seed), late(seed + 1)))
            model = BUILDERS[name](NUM_BLOCKS)
            with session.apply(plan, model) as applied:
                seen = models.train(model, amp=amp, num_steps=5)
                slabs = {block.copies.slab for block in applied.engine.blocks}
                assert all(type(block.copies) is OverlappedCopies for block in applied.engine.blocks)
        expected = plain_run(name, amp)
        assert len(seen) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
        assert applied.counters.departures == 0
        assert all((slab.used_bytes, slab.overflow_bytes) == (0, 0) for slab in slabs)

    return test


# 3 plans for each of 4 cases here, 250 each in the full suite.
test_random_plans_and_delays = cases(amounts(random_plan_test(3)))
test_many_random_plans_and_delays = pytest.mark.full(
    pytest.mark.timeout(7200)(cases(amounts(random_plan_test(in_full(250)))))
)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("way", ["all", "every third block", "drawn"])
def test_measured_peaks_are_within_the_predicted(way: str, window: int) -> None:
    shape = {"batch": 2, "sequence": 128}
    model = models.llama(6, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    plan = session.plan(model, models.batch_for(0, **shape), budget="1GiB", host_budget="1GiB", optimizer=optimizer)
    swapping = tuple(
        tuple(Action.SWAP if Action.SWAP in p.values[i].actions else Action.KEEP for i in p.saved)
        for p in map(plan.step.program_of, range(6))
    )
    decisions = {
        "all": swapping,
        "every third block": tuple(
            actions if block % 3 == 0 else (Action.KEEP,) * len(actions) for block, actions in enumerate(swapping)
        ),
        "drawn": drawn(plan, window),
    }[way]
    chosen = planned(plan, window, decisions)
    with session.apply(chosen, model, verify="off") as applied:
        for step in range(6):
            if step == 3:
                measured = session.measure(model)
                measured.__enter__()
            output = model(**models.batch_for(step, **shape))
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        measured.__exit__(None, None, None)
    peak = max(measured.measurement.peak_bytes)
    assert peak <= chosen.prediction.peak_bytes
    assert peak >= 0.97 * chosen.prediction.peak_bytes  # not by keeping nothing at all
    assert peak < plan.unplanned.peak_bytes
    assert applied.counters.swapped_bytes == 6 * chosen.prediction.swapped_bytes
    if way == "all":
        assert applied.counters.returned_bytes * 6 == applied.counters.swapped_bytes * (6 - window)
