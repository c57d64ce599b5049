"""Pictures made of letters: the peak as a bar, memory through a step, decisions by block."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

from stowplan.core.plan import MomentBytes, Plan
from stowplan.core.program import Action, BlockProgram, Decision, Split, Value
from stowplan.core.units import KIB, MIB
from stowplan.reports.figures import CATEGORIES, bytes_by_category, phase_of
from stowplan.reports.lines import Unit, clean, cut_middle

__all__ = ["ACTION_LETTERS", "decision_grid", "memory_chart", "peak_bar"]

ACTION_LETTERS = {Action.KEEP: "K", Action.SWAP: "s", Action.RECOMPUTE: "c"}
_SPLIT_MARKS = "123456789"  # of the different splits of one value, the most frequent first; "+" for all others
_OTHER_SPLIT = "+"

_CHART_ROWS = 20
_AXIS_WIDTH = 9  # of the figures left of the chart
_WIDEST_MOMENT = 8  # columns
_TIME_SPACING = 12  # columns from one time on the axis to the next
_NAME_WIDTH, _SIZE_WIDTH, _COUNTS_WIDTH = 30, 9, 17


def peak_bar(moment: MomentBytes, plan: Plan, unit: Unit, width: int) -> list[str]:
    """One bar from nothing to the budget (or to the peak, if that is more), and a list of its parts."""
    label, end = "at peak ", f" budget {unit.text(plan.budget_bytes)}"
    if moment.peak_bytes > plan.budget_bytes:
        end = f" peak {unit.text(moment.peak_bytes)}"
    room = max(10, width - len(label) - len(end) - 2)
    parts = bytes_by_category(moment, plan.step)
    scale = room / max(plan.budget_bytes, moment.peak_bytes, 1)
    edges = [0, *(round(edge * scale) for edge in accumulate(parts))]
    bar = "".join(letter * (edges[i + 1] - edges[i]) for i, (letter, _) in enumerate(CATEGORIES))
    lines = [f"{label}|{bar:<{room}}|{end}"]
    entries = [
        f"{letter} {name:<27}{unit.text(part):>13}" for (letter, name), part in zip(CATEGORIES, parts, strict=True)
    ]
    return lines + ["  " + "   ".join(entries[i : i + 2]) for i in range(0, len(entries), 2)]


def memory_chart(plan: Plan, bytes_unit: Unit, seconds_unit: Unit, width: int) -> list[str]:
    """Moments of the step as columns of letters, the budget as a dashed line, phases and times below."""
    columns = _columns(plan.prediction.moments, width - _AXIS_WIDTH - 2)
    peak = max(moment.peak_bytes for moment in columns)
    row_bytes = _row_bytes(max(plan.budget_bytes, peak), bytes_unit)
    num_rows = max(1, math.ceil(max(plan.budget_bytes, peak) / row_bytes))
    stacks = [list(accumulate(bytes_by_category(moment, plan.step))) for moment in columns]
    budget_row = min(num_rows - 1, int(plan.budget_bytes / row_bytes))
    lines = []
    for row in reversed(range(num_rows)):
        blank = "-" if row == budget_row else " "
        picture = "".join(_letter(stack, (row + 0.5) * row_bytes, blank) for stack in stacks)
        lines.append(f"{bytes_unit.number((row + 1) * row_bytes):>{_AXIS_WIDTH}} |{picture}".rstrip())
    lines.append(f"{bytes_unit.number(0):>{_AXIS_WIDTH}} +{'-' * len(columns)}")
    margin = " " * (_AXIS_WIDTH + 2)
    lines.append(margin + _phase_axis(columns))
    return [*lines, margin + _time_axis(columns, seconds_unit)]


def _columns(moments: Sequence[MomentBytes], room: int) -> list[MomentBytes]:
    """One moment for each column: a moment may span several, or a column show the highest of several."""
    if len(moments) <= room:
        span = min(_WIDEST_MOMENT, room // len(moments))
        return [moment for moment in moments for _ in range(span)]
    edges = [len(moments) * column // room for column in range(room + 1)]
    return [max(moments[a:b], key=lambda moment: moment.peak_bytes) for a, b in pairwise(edges)]


def _row_bytes(top_bytes: int, unit: Unit) -> float:
    """Bytes of one row: a round number of units, so that the rows reach ``top_bytes``."""
    least = max(top_bytes, 1) / unit.size / _CHART_ROWS
    power: float = 10.0 ** math.floor(math.log10(least))
    return unit.size * next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor >= least)


def _letter(stack: Sequence[int], height_bytes: float, blank: str) -> str:
    """What a stack of bytes has at ``height_bytes``."""
    for (letter, _), edge in zip(CATEGORIES, stack, strict=True):
        if height_bytes < edge:
            return letter
    return blank


def _phase_axis(columns: Sequence[MomentBytes]) -> str:
    axis = ""
    for phase, members in groupby(columns, key=phase_of):
        span = len(list(members))
        axis += "|" + clean(phase)[: span - 1].ljust(span - 1)
    return axis


def _time_axis(columns: Sequence[MomentBytes], unit: Unit) -> str:
    axis = ""
    for column in range(0, len(columns), _TIME_SPACING):
        text = unit.number(columns[column].seconds)
        if len(axis) <= column and column + len(text) + len(unit.name) < len(columns):
            axis = axis.ljust(column) + text + (f" {unit.name}" if column == 0 else "")
    return axis


def decision_grid(plan: Plan, program: int, width: int) -> list[str]:
    """Rows of saved values, columns of the blocks that run ``program``, a letter for each decision."""
    blocks = [block for block, runs in enumerate(plan.step.blocks) if runs == program]
    room = (width - _NAME_WIDTH - _SIZE_WIDTH - _COUNTS_WIDTH - 3) // 10 * 10
    lines: list[str] = []
    for first in range(0, len(blocks), room):
        lines += _grid_part(plan, plan.step.programs[program], blocks[first : first + room])
    return lines


def _grid_part(plan: Plan, program: BlockProgram, blocks: Sequence[int]) -> list[str]:
    margin = " " * (_NAME_WIDTH + _SIZE_WIDTH + 2)
    largest = max((program.values[i].size_bytes for i in program.saved), default=0)
    unit = Unit("MiB", MIB, 2) if largest >= MIB // 10 else Unit("KiB", KIB, 2)
    title = f"{'block':<{_NAME_WIDTH}}{unit.name:>{_SIZE_WIDTH}}"
    lines = [(margin + ruler).rstrip() for ruler in _block_rulers(blocks)]
    lines[-1] = title + lines[-1][len(title) :]
    for position, index in enumerate(program.saved):
        value = program.values[index]
        decisions = [plan.decisions[block][position] for block in blocks]
        splits = Counter(decision for decision in decisions if isinstance(decision, Split)).most_common()
        marks = dict[Decision, str](ACTION_LETTERS.items())
        marks.update((split, mark) for (split, _), mark in zip(splits, _SPLIT_MARKS, strict=False))
        letters = "".join(marks.get(decision, _OTHER_SPLIT) for decision in decisions)
        name, size = cut_middle(value.name, _NAME_WIDTH - 1), unit.number(value.size_bytes)
        lines.append(f"{name:<{_NAME_WIDTH}}{size:>{_SIZE_WIDTH}}  {letters} {_counts(letters)}".rstrip())
        for (split, count), mark in zip(splits, _SPLIT_MARKS, strict=False):
            lines.append(f"  {mark} {_shares(value, split)} of rows in {count} block{'s' if count > 1 else ''}")
        rest = sum(count for _, count in splits[len(_SPLIT_MARKS) :])
        if rest:
            lines.append(f"  {_OTHER_SPLIT} other splits by rows in {rest} block{'s' if rest > 1 else ''}")
    return lines


def _shares(value: Value, split: Split) -> str:
    """How a value is split, in the order of its rows: ``"recompute 25% / swap 50% / keep 25%"``."""
    kept = value.num_rows - split.recomputed - split.swapped
    rows = {Action.RECOMPUTE: split.recomputed, Action.SWAP: split.swapped, Action.KEEP: kept}
    return " / ".join(f"{action} {100 * count / value.num_rows:.3g}%" for action, count in rows.items() if count)


def _block_rulers(blocks: Sequence[int]) -> list[str]:
    """Two lines of block numbers: the last digit of each, and above it the tens where they change."""
    upper = [" "] * len(blocks)
    free_from = 0
    for column, block in enumerate(blocks):
        mark = str(block // 10)
        starts = column == 0 or blocks[column - 1] // 10 != block // 10
        if starts and column >= free_from and column + len(mark) <= len(blocks):
            upper[column : column + len(mark)] = mark
            free_from = column + len(mark) + 1
    return ["".join(upper), "".join(str(block % 10) for block in blocks)]


def _counts(letters: str) -> str:
    counts = Counter(letters)
    return " ".join(f"{counts[letter]:>4}{letter}" for letter in ACTION_LETTERS.values() if counts[letter])
