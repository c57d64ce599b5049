"""Every architecture of the zoo under random plans: bit for bit as without a plan."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from stowplan import session
from stowplan.core.plan import Plan
from stowplan.core.program import Action
from tests.offload.test_exactness import assert_same
from tests.plans import in_full, random_decisions
from tests.zoo import ZOO, train


def _case(name: str, amp: bool, attention: str) -> Any:
    """Eager attention beside SDPA is for `make test`, not for `make test-fast`."""
    identity = f"{name.replace(', ', '_').replace(' ', '_')}-{'bf16' if amp else 'fp32'}-{attention}"
    marks = [pytest.mark.slow] if attention != ZOO[name].attentions[0] else []
    return pytest.param(name, amp, attention, id=identity, marks=marks)


CASES = [
    _case(name, amp, attention)
    for name, specimen in ZOO.items()
    for amp in (False, True)
    for attention in specimen.attentions
]
each_case = pytest.mark.parametrize(("name", "amp", "attention"), CASES)


@cache
def plain_run(name: str, amp: bool, attention: str) -> list[torch.Tensor]:
    return train(ZOO[name], ZOO[name].build(attention), amp)


@cache
def captured(name: str, amp: bool, attention: str) -> Plan:
    """A plan whose decisions the tests replace; capturing it once per case is enough."""
    specimen = ZOO[name]
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        model, batch = specimen.build(attention), specimen.batch(0)
        return session.plan(model, batch, budget="1GiB", host_budget="1GiB", blocks=specimen.blocks)


def check(name: str, amp: bool, attention: str, seed: int) -> None:
    note(f"seed {seed}")
    model = ZOO[name].build(attention)
    with session.apply(random_decisions(captured(name, amp, attention), seed), model) as applied:
        seen = train(ZOO[name], model, amp)
    assert_same(seen, plain_run(name, amp, attention))
    assert applied.counters.departures == 0


SEEDS = st.integers(0, 2**31)


def random_plans(number: int) -> Any:
    """So many of them; a failing seed is printed."""
    return settings(
        max_examples=number, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True, database=None
    )


@each_case
@random_plans(4)
@given(seed=SEEDS)
def test_random_plans(name: str, amp: bool, attention: str, seed: int) -> None:
    check(name, amp, attention, seed)


@pytest.mark.full
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("name", list(ZOO))
@random_plans(in_full(100))
@given(seed=SEEDS, amp=st.booleans(), eager=st.booleans())
def test_many_random_plans(name: str, seed: int, amp: bool, eager: bool) -> None:
    """For each model, in all its precisions and attentions together."""
    check(name, amp, ZOO[name].attentions[-1 if eager else 0], seed)


@each_case
def test_there_is_something_to_decide(name: str, amp: bool, attention: str) -> None:
    """All stacks are found, every block has values that may be recomputed, and values that may be swapped."""
    step = captured(name, amp, attention).step
    assert step.num_blocks == ZOO[name].num_blocks
    for program in step.programs:
        actions = [program.values[i].actions for i in program.saved]
        assert any(Action.RECOMPUTE in allowed for allowed in actions)
        assert any(Action.SWAP in allowed for allowed in actions)
