"""The promise: losses, gradients, parameters and random numbers equal the plain run's, bit for bit, under any plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from stowplan import session
from stowplan.core.plan import Plan
from stowplan.core.program import Action
from tests import models
from tests.plans import in_full, random_decisions, with_decisions

BUILDERS: dict[str, Callable[..., torch.nn.Module]] = {"llama": models.llama, "gpt2": models.gpt2}
CASES = [
    pytest.param(name, amp, attention, id=f"{name}-{'bf16' if amp else 'fp32'}-{attention}")
    for name in BUILDERS
    for amp in (False, True)
    for attention in ("sdpa", "eager")
]


@cache
def plain_run(name: str, amp: bool, attention: str) -> list[torch.Tensor]:
    return models.train(BUILDERS[name](attention=attention), amp=amp)


@cache
def captured(name: str, amp: bool, attention: str) -> Plan:
    """A plan whose decisions the tests replace; capturing it once per case is enough."""
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        return session.plan(BUILDERS[name](attention=attention), models.batch_for(0), budget="1GiB", host_budget="1GiB")


def assert_same(seen: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(seen) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def check(name: str, amp: bool, attention: str, plan: Plan) -> None:
    model = BUILDERS[name](attention=attention)
    with session.apply(plan, model) as applied:
        seen = models.train(model, amp=amp)
    assert_same(seen, plain_run(name, amp, attention))
    assert applied.counters.departures == 0


@pytest.mark.parametrize("action", list(Action))
@pytest.mark.parametrize(("name", "amp", "attention"), CASES)
def test_one_action_for_all(name: str, amp: bool, attention: str, action: Action) -> None:
    plan = captured(name, amp, attention)
    programs = [plan.step.program_of(block) for block in range(plan.step.num_blocks)]
    decisions = tuple(
        tuple(action if action in p.values[i].actions else Action.KEEP for i in p.saved) for p in programs
    )
    assert action is Action.KEEP or any(action in actions for actions in decisions)
    check(name, amp, attention, with_decisions(plan, decisions))


def random_plan_test(num_examples: int) -> Callable[..., None]:
    @settings(max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
    @given(seed=st.integers(0, 2**31))
    def test(name: str, amp: bool, attention: str, seed: int) -> None:
        note(f"seed {seed}")
        check(name, amp, attention, random_decisions(captured(name, amp, attention), seed))

    return test


# 20 plans for each of 8 cases here, 125 each in the full suite; a failing seed is printed.
test_random_plans = pytest.mark.parametrize(("name", "amp", "attention"), CASES)(random_plan_test(20))
test_many_random_plans = pytest.mark.full(
    pytest.mark.timeout(7200)(
        pytest.mark.parametrize(("name", "amp", "attention"), CASES)(random_plan_test(in_full(125)))
    )
)


def test_recomputing_can_be_seen_to_happen() -> None:
    """The comparison above would also pass if nothing were ever dropped."""
    plan = captured("llama", False, "sdpa")
    programs = [plan.step.program_of(block) for block in range(plan.step.num_blocks)]
    decisions = tuple(
        tuple(Action.RECOMPUTE if Action.RECOMPUTE in p.values[i].actions else Action.SWAP for i in p.saved)
        for p in programs
    )
    expected = [
        sum(p.values[i].size_bytes for i, a in zip(p.saved, actions, strict=True) if a is Action.RECOMPUTE)
        for p, actions in zip(programs, decisions, strict=True)
    ]
    model = models.llama()
    with session.apply(with_decisions(plan, decisions), model) as applied:
        model(**models.batch_for(0)).loss.backward()
    assert applied.counters.recomputed_bytes == sum(expected)
    assert applied.counters.swapped_bytes == sum(p.saved_bytes for p in programs) - sum(expected)
