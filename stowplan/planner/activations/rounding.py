"""From the fractions of a linear program to decisions: whole values spread over the blocks, rows where they divide."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from stowplan.core.program import Action, Decision, Decisions, Split, decision_by_rows
from stowplan.planner.activations.problem import Problem, ProgramChoices

__all__ = ["Fractions", "decide", "first_rows", "grain", "nearest_rows", "rows_of"]

Fractions = tuple[tuple[tuple[float, float], ...], ...]  # by block and saved value: how much is kept, and swapped

_GOLDEN = 0.6180339887498949  # multiples of it modulo 1 are spread evenly however many are taken
_OP_STRIDE = 0.3819660112501051  # a different order of blocks for every op, so that no block gets all swaps
_LEAST_GRAIN, _MOST_PARTS = 16, 16
_NEARLY = 1e-6  # of a value: what a solver leaves of nothing


def grain(num_rows: int) -> int:
    """Kept rows begin at multiples of this: a plan that is read by people needs no finer steps."""
    return max(_LEAST_GRAIN, -(-num_rows // _MOST_PARTS))


def first_rows(choices: ProgramChoices, position: int) -> tuple[int, ...]:
    """Numbers of first rows of a divisible value that may be recomputed, from none to all."""
    whole = (choices.num_rows[position],) if Action.RECOMPUTE in choices.actions[position] else ()
    return (0, *choices.splits[position], *whole)


def rows_of(num_rows: int, decision: Decision) -> tuple[int, int]:
    """(recomputed rows, the row where kept ones begin)."""
    if isinstance(decision, Split):
        return decision.recomputed, decision.recomputed + decision.swapped
    return (num_rows if decision is Action.RECOMPUTE else 0), (0 if decision is Action.KEEP else num_rows)


def nearest_rows(choices: ProgramChoices, position: int, recomputed: int, kept_from: int) -> Decision:
    """The decision whose first ``recomputed`` rows are made again and whose rows from ``kept_from`` on are kept.

    Where the value may not be swapped, or not kept, the other takes all rows that are not recomputed.
    """
    num_rows, actions = choices.num_rows[position], choices.actions[position]
    if Action.KEEP not in actions:
        kept_from = num_rows
    elif Action.SWAP not in actions:
        kept_from = recomputed
    return decision_by_rows(num_rows, recomputed, max(recomputed, kept_from) - recomputed)


def decide(problem: Problem, fractions: Fractions) -> Decisions:
    """Turn fractions of values into decisions; they may exceed the budgets by a little.

    A value that may not be divided is kept, swapped or recomputed whole in these fractions of the blocks, evenly spread
    over the depth; values that one op makes together are recomputed in the same blocks. Rows that divide are rounded to
    one of the two nearest splits, up or down in turn, together in one block: what is recomputed there starts from the
    same rows.
    """
    decisions = []
    for block in problem.order:
        program, choices = problem.step.program_of(block), problem.choices_of(block)
        chosen: list[Decision] = []
        for position, (kept, swapped) in enumerate(fractions[block]):
            if choices.num_rows[position]:
                chosen.append(_divided(choices, position, kept, swapped, block * _GOLDEN % 1.0))
                continue
            producer = program.values[program.saved[position]].producer
            place = (block * _GOLDEN + (0 if producer is None else producer + 1) * _OP_STRIDE) % 1.0
            chosen.append(_whole(choices.actions[position], kept, swapped, place))
        decisions.append(tuple(chosen))
    return tuple(decisions)


def _whole(allowed: Sequence[Action], kept: float, swapped: float, place: float) -> Action:
    recomputed = max(0.0, 1 - kept - swapped)
    wish = Action.RECOMPUTE if place < recomputed else Action.SWAP if place < recomputed + swapped else Action.KEEP
    return wish if wish in allowed else allowed[0]


def _divided(choices: ProgramChoices, position: int, kept: float, swapped: float, place: float) -> Decision:
    num_rows = choices.num_rows[position]
    recomputed = _one_of(first_rows(choices, position), (1 - kept - swapped) * num_rows, place)
    step = grain(num_rows)
    edges = [recomputed, *range(recomputed // step * step + step, num_rows, step), num_rows]
    rest = kept / (kept + swapped) if kept + swapped > _NEARLY else 0.0  # how much of the rows that stay is kept
    kept_from = _one_of(edges, num_rows - rest * (num_rows - recomputed), place)
    return nearest_rows(choices, position, recomputed, kept_from)


def _one_of(levels: Sequence[int], wish: float, place: float) -> int:
    """One of the two ``levels`` next to ``wish``; over all places in [0, 1) they average to it."""
    wish = min(max(wish, levels[0]), levels[-1])
    upper = min(bisect_right(levels, wish), len(levels) - 1)
    low, high = levels[max(0, upper - 1)], levels[upper]
    share = (wish - low) / (high - low) if high > low else 0.0
    return high if place < share - _NEARLY or share > 1 - _NEARLY else low
