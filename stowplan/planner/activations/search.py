"""Better decisions by small changes: descent with the closed form.

The solver decides for groups of blocks, the relaxation for fractions of values. Both leave room that only decisions of
single blocks can use: every step here changes a few values, keeps within the budgets (or comes nearer to them), and
takes less time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from stowplan.core.program import Action, BlockDecisions, Decision
from stowplan.planner.activations.draft import Draft
from stowplan.planner.activations.problem import ProgramChoices
from stowplan.planner.activations.rounding import first_rows, grain, nearest_rows, rows_of

__all__ = ["improve"]

_NUM_TRADES = 12  # best purchases and sales that are tried in pairs


def improve(draft: Draft, until: float, stop_seconds: float = 0.0) -> None:
    """Descend until nothing small helps, ``time.monotonic()`` reaches ``until``, or a step takes ``stop_seconds``."""
    improved = True
    while improved and time.monotonic() < until:
        improved = False
        for block in reversed(draft.problem.order):
            if time.monotonic() >= until or (draft.excess_bytes == 0 and draft.seconds <= stop_seconds):
                return
            for chosen in _neighbours(draft, block):
                improved |= draft.improve_by({block: chosen})
        if not improved:
            improved = _trade(draft, until)


def _neighbours(draft: Draft, block: int) -> Iterator[BlockDecisions]:
    """Other choices for ``block``: one op's values changed together, one value alone, or what a like block does."""
    program, choices = draft.problem.step.program_of(block), draft.problem.choices_of(block)
    together: dict[int, list[int]] = {}
    for position, index in enumerate(program.saved):
        producer = program.values[index].producer
        together.setdefault(-1 - position if producer is None else producer, []).append(position)
    sets = [frozenset(positions) for positions in together.values()]
    sets += [frozenset([position]) for positions in together.values() if len(positions) > 1 for position in positions]
    for positions in sets:
        for action in Action:
            now = draft.chosen[block]
            if all(action in choices.actions[n] for n in positions) and any(now[n] is not action for n in positions):
                yield tuple(action if n in positions else other for n, other in enumerate(now))
    if draft.problem.by_rows:
        yield from _row_neighbours(draft, block, sets)
    yield from dict.fromkeys(
        draft.chosen[other] for other in draft.problem.order if draft.problem.choices_of(other) is choices
    )


def _row_neighbours(draft: Draft, block: int, sets: Sequence[frozenset[int]]) -> Iterator[BlockDecisions]:
    """One step more or fewer rows: recomputed by values that do so for the same share of theirs, or kept by one."""
    choices, now = draft.problem.choices_of(block), draft.chosen[block]
    divisible = [n for n, num_rows in enumerate(choices.num_rows) if num_rows]
    shares: dict[Fraction, set[int]] = {}
    for n in divisible:
        recomputed, kept_from = rows_of(choices.num_rows[n], now[n])
        if recomputed:
            shares.setdefault(Fraction(recomputed, choices.num_rows[n]), set()).add(n)
        step = grain(choices.num_rows[n])
        for edge in (kept_from // step * step + step, -(-kept_from // step) * step - step):
            if recomputed <= edge <= choices.num_rows[n]:
                yield _with(now, {n: nearest_rows(choices, n, recomputed, edge)})
    started = [positions & set(divisible) for positions in sets]
    joint = [*shares.values(), *(positions for positions in started if positions)]
    for positions in dict.fromkeys(frozenset(positions) for positions in joint):
        for up in (True, False):
            for kept_stays in (True, False):
                changes = {n: _step(choices, n, now[n], up=up, kept_stays=kept_stays) for n in positions}
                if any(now[n] != decision for n, decision in changes.items()):
                    yield _with(now, changes)


def _step(choices: ProgramChoices, n: int, now: Decision, *, up: bool, kept_stays: bool) -> Decision:
    """``now`` with the next number of recomputed rows, at the cost of the swapped rows or of the kept ones."""
    num_rows, levels = choices.num_rows[n], first_rows(choices, n)
    recomputed, kept_from = rows_of(num_rows, now)
    at = levels.index(recomputed) + (1 if up else -1)
    if not 0 <= at < len(levels):
        return now
    if not kept_stays:
        kept_from = min(num_rows, kept_from + levels[at] - recomputed)
    return nearest_rows(choices, n, levels[at], kept_from)


def _with(now: BlockDecisions, changes: Mapping[int, Decision]) -> BlockDecisions:
    return tuple(changes.get(n, decision) for n, decision in enumerate(now))


def _trade(draft: Draft, until: float) -> bool:
    """Buy time in one block with bytes that another gives up: for changes that fit only in pairs."""
    if draft.excess_bytes:
        return False
    purchases: list[tuple[float, int, BlockDecisions]] = []
    sales: list[tuple[float, int, BlockDecisions]] = []
    for block in draft.problem.order:
        if time.monotonic() >= until:
            return False
        now = draft.blocks[block]
        for chosen in _neighbours(draft, block):
            then = draft.footprints.of(block, chosen)
            freed = now.alive_bytes - then.alive_bytes
            slower = then.replay_seconds - now.replay_seconds + draft.copy_seconds(then) - draft.copy_seconds(now)
            if freed < 0 and slower < 0:
                purchases.append((slower, block, chosen))
            elif freed > 0:
                sales.append((slower / freed, block, chosen))
    for _, block, chosen in sorted(purchases, key=lambda entry: entry[:2])[:_NUM_TRADES]:
        for _, other, given in sorted(sales, key=lambda entry: entry[:2])[:_NUM_TRADES]:
            if time.monotonic() >= until:
                return False
            if other != block and draft.improve_by({block: chosen, other: given}):
                return True
    return False
