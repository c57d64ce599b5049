"""Random decisions by rows, for any captured plan."""

from __future__ import annotations

import random

from stowplan.core.plan import Plan
from stowplan.core.program import Action, Decision, Value, decision_by_rows
from tests.plans import with_decisions

__all__ = ["random_splits"]


def random_splits(plan: Plan, seed: int) -> Plan:
    """Every value that has rows is split at random, most of them; the others get a random action."""
    generator = random.Random(seed)
    programs = [plan.step.program_of(block) for block in range(plan.step.num_blocks)]
    return with_decisions(plan, tuple(tuple(_choose(p.values[i], generator) for i in p.saved) for p in programs))


def _choose(value: Value, generator: random.Random) -> Decision:
    if not value.num_rows or generator.random() < 0.25:
        return generator.choice(value.actions)
    recomputed = generator.choice((0, *value.splits, *value.splits))
    rest = value.num_rows - recomputed
    swapped = generator.choice((0, rest, generator.randint(0, rest)))
    if swapped and Action.SWAP not in value.actions:
        swapped = 0
    return decision_by_rows(value.num_rows, recomputed, swapped)
