"""Better decisions by small changes: rounding the relaxation block by block, then descent with the closed form.

The solver decides for groups of blocks, the relaxation for fractions of values. Both leave room that only decisions of
single blocks can use: every step here changes a few values, keeps within the budgets (or comes nearer to them), and
takes less time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from stowplan.core.plan import Decisions
from stowplan.core.program import Action
from stowplan.planner.activations.draft import Actions, Draft
from stowplan.planner.activations.problem import Problem

__all__ = ["dither", "improve"]

_GOLDEN = 0.6180339887498949  # multiples of it modulo 1 are spread evenly however many are taken
_OP_STRIDE = 0.3819660112501051  # a different order of blocks for every op, so that no block gets all swaps
_NUM_TRADES = 12  # best purchases and sales that are tried in pairs


def dither(problem: Problem, fractions: tuple[tuple[tuple[float, float], ...], ...]) -> Decisions:
    """Turn fractions of values into whole values of a fraction of the blocks, evenly spread over the depth.

    ``fractions[block][n]`` is how much of saved value n is kept and swapped. Values that one op makes together are
    recomputed in the same blocks. The result may exceed the budgets by a little.
    """
    decisions = []
    for block in problem.order:
        program, choices = problem.step.program_of(block), problem.choices_of(block)
        actions = []
        for position, (kept, swapped) in enumerate(fractions[block]):
            producer = program.values[program.saved[position]].producer
            place = (block * _GOLDEN + (0 if producer is None else producer + 1) * _OP_STRIDE) % 1.0
            recomputed = max(0.0, 1 - kept - swapped)
            wish = (
                Action.RECOMPUTE if place < recomputed else Action.SWAP if place < recomputed + swapped else Action.KEEP
            )
            allowed = choices.actions[position]
            actions.append(wish if wish in allowed else allowed[0])
        decisions.append(tuple(actions))
    return tuple(decisions)


def improve(draft: Draft, until: float, stop_seconds: float = 0.0) -> None:
    """Descend until nothing small helps, ``time.monotonic()`` reaches ``until``, or a step takes ``stop_seconds``."""
    improved = True
    while improved and time.monotonic() < until:
        improved = False
        for block in reversed(draft.problem.order):
            if time.monotonic() >= until or (draft.excess_bytes == 0 and draft.seconds <= stop_seconds):
                return
            for actions in _neighbours(draft, block):
                improved |= draft.improve_by({block: actions})
        if not improved:
            improved = _trade(draft, until)


def _neighbours(draft: Draft, block: int) -> Iterator[Actions]:
    """Other choices for ``block``: one op's values changed together, one value alone, or what a like block does."""
    program, choices = draft.problem.step.program_of(block), draft.problem.choices_of(block)
    together: dict[int, list[int]] = {}
    for position, index in enumerate(program.saved):
        together.setdefault(program.values[index].producer or -1 - position, []).append(position)
    sets = [frozenset(positions) for positions in together.values()]
    sets += [frozenset([position]) for positions in together.values() if len(positions) > 1 for position in positions]
    for positions in sets:
        for action in Action:
            now = draft.actions[block]
            if all(action in choices.actions[n] for n in positions) and any(now[n] is not action for n in positions):
                yield tuple(action if n in positions else other for n, other in enumerate(now))
    like = {draft.actions[other] for other in draft.problem.order if draft.problem.choices_of(other) is choices}
    yield from sorted(like)


def _trade(draft: Draft, until: float) -> bool:
    """Buy time in one block with bytes that another gives up: for changes that fit only in pairs."""
    if draft.excess_bytes:
        return False
    purchases: list[tuple[float, int, Actions]] = []
    sales: list[tuple[float, int, Actions]] = []
    for block in draft.problem.order:
        now = draft.blocks[block]
        for actions in _neighbours(draft, block):
            then = draft.footprints.of(block, actions)
            freed = now.alive_bytes - then.alive_bytes
            slower = then.replay_seconds - now.replay_seconds + draft.copy_seconds(then) - draft.copy_seconds(now)
            if freed < 0 and slower < 0:
                purchases.append((slower, block, actions))
            elif freed > 0:
                sales.append((slower / freed, block, actions))
    for _, block, actions in sorted(purchases, key=lambda entry: entry[:2])[:_NUM_TRADES]:
        for _, other, given in sorted(sales, key=lambda entry: entry[:2])[:_NUM_TRADES]:
            if time.monotonic() >= until:
                return False
            if other != block and draft.improve_by({block: actions, other: given}):
                return True
    return False
