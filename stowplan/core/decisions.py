"""Decisions in a plan file: by ranges of blocks and names of values, checked against the step that they are for."""

from __future__ import annotations

import re

from stowplan.core.allocations import check_block_allocations, check_outside_allocations
from stowplan.core.program import Action, Decisions, Split, StepProgram, Value
from stowplan.core.records import RecordError

__all__ = ["check_indices", "decisions_from_plain", "decisions_to_plain"]

_BLOCKS = re.compile(r"(?P<first>[0-9]{1,9})(-(?P<last>[0-9]{1,9}))?")
_ROWS = "rows"  # the key of the values whose rows do different things
_ORDER = (Action.RECOMPUTE, Action.SWAP, Action.KEEP)  # of the rows of a value


def check_indices(step: StepProgram) -> None:
    """Every index must point at something, a saved value's name at one value, and rows divide. Raises RecordError."""
    if len(step.block_names) != step.num_blocks:
        raise RecordError(f"$.step.block_names: {len(step.block_names)} names of {step.num_blocks} blocks")
    for block, index in enumerate(step.blocks):
        _check_index(index, len(step.programs), f"$.step.blocks[{block}]")
    before = 0
    for number, gap in enumerate(step.gaps):
        if not before < gap.block < step.num_blocks:
            raise RecordError(
                f"$.step.gaps[{number}].block: {gap.block} is not between {before + 1} and {step.num_blocks - 1}"
            )
        before = gap.block
    _check_allocations(step)
    for number, program in enumerate(step.programs):
        path = f"$.step.programs[{number}]"
        for i, value in enumerate(program.values):
            if value.producer is not None:
                _check_index(value.producer, len(program.ops), f"{path}.values[{i}].producer")
            _check_rows(value, f"{path}.values[{i}]")
        for i, op in enumerate(program.ops):
            for field, indices in (("inputs", op.inputs), ("outputs", op.outputs)):
                for j, index in enumerate(indices):
                    _check_index(index, len(program.values), f"{path}.ops[{i}].{field}[{j}]")
        names = [program.values[i].name for i in program.saved]
        if len(set(names)) != len(names):
            raise RecordError(f"{path}.values: two saved values have the same name")


def _check_allocations(step: StepProgram) -> None:
    """Either everything is there of the step's requests, or nothing."""
    if step.outside is not None:
        check_outside_allocations(step.outside, step.num_blocks, "$.step.outside")
    for number, program in enumerate(step.programs):
        path = f"$.step.programs[{number}].allocations"
        if (program.allocations is None) != (step.outside is None):
            raise RecordError(f"{path}: goes with $.step.outside, and only with that")
        if program.allocations is not None:
            check_block_allocations(program.allocations, len(program.saved), len(program.values), path)


def _check_index(index: int, length: int, path: str) -> None:
    if not 0 <= index < length:
        raise RecordError(f"{path}: {index} is not between 0 and {length - 1}")


def _check_rows(value: Value, path: str) -> None:
    if value.num_rows < 0 or (value.num_rows and value.size_bytes % value.num_rows):
        raise RecordError(f"{path}.num_rows: {value.num_rows} rows do not divide {value.size_bytes} bytes")
    before = 0
    for number, rows in enumerate(value.splits):
        if not before < rows < value.num_rows:
            raise RecordError(
                f"{path}.splits[{number}]: {rows} is not between {before + 1} and {value.num_rows - 1}, ascending"
            )
        before = rows


def decisions_to_plain(decisions: Decisions, step: StepProgram) -> list[dict[str, object]]:
    """Equal decisions of consecutive blocks as one entry: ``{"blocks": "0-5", "keep": [...], …}``."""
    entries: list[dict[str, object]] = []
    first = 0
    for block in range(1, step.num_blocks + 1):
        if (
            block < step.num_blocks
            and step.blocks[block] == step.blocks[first]
            and decisions[block] == decisions[first]
        ):
            continue
        program = step.program_of(first)
        values = [program.values[i] for i in program.saved]
        chosen = {value.name: decision for value, decision in zip(values, decisions[first], strict=True)}
        assert len(chosen) == len(values), "decisions are written by name: names of saved values must differ"
        entry: dict[str, object] = {"blocks": f"{first}-{block - 1}" if block - 1 > first else str(first)}
        for action in Action:
            entry[action.value] = [name for name, decision in chosen.items() if decision is action]
        rows = {
            value.name: _rows_to_plain(value, decision)
            for value, decision in zip(values, decisions[first], strict=True)
            if isinstance(decision, Split)
        }
        if rows:
            entry[_ROWS] = rows
        entries.append(entry)
        first = block
    return entries


def _rows_to_plain(value: Value, split: Split) -> dict[str, int]:
    """``{"recompute": 64, "swap": 192}``: how many rows do what, from the first on."""
    counts = (split.recomputed, split.swapped, value.num_rows - split.recomputed - split.swapped)
    return {action.value: count for action, count in zip(_ORDER, counts, strict=True) if count}


def decisions_from_plain(plain: object, step: StepProgram) -> list[list[object]]:
    """Expand block ranges into the plain form of ``Decisions``; checks that every value has exactly one decision."""
    if not isinstance(plain, list):
        raise RecordError("$.decisions: a list of block ranges is expected")
    expanded: list[list[object]] = []
    for position, entry in enumerate(plain):
        path = f"$.decisions[{position}]"
        if not isinstance(entry, dict):
            raise RecordError(f'{path}: an object with "blocks": "FIRST-LAST" is expected')
        chosen = _chosen_by_name(entry, path)
        for block in _next_blocks(entry.get("blocks"), len(expanded), step.num_blocks, f"{path}.blocks"):
            program = step.program_of(block)
            expanded.append(_chosen_in_order([program.values[i] for i in program.saved], chosen, path))
    if len(expanded) != step.num_blocks:
        raise RecordError(f"$.decisions: {len(expanded)} blocks of {step.num_blocks}")
    return expanded


def _next_blocks(text: object, first: int, num_blocks: int, path: str) -> range:
    """The blocks that ``"FIRST-LAST"`` or ``"FIRST"`` names; they must go on from block ``first``."""
    match = _BLOCKS.fullmatch(text) if isinstance(text, str) else None
    if match is None or int(match["first"]) != first or int(match["last"] or first) < first:
        raise RecordError(f"{path}: {text!r} is not the next range of blocks, which begins with {first}")
    last = int(match["last"] or first)
    if last >= num_blocks:
        raise RecordError(f"{path}: block {last} of {num_blocks}")
    return range(first, last + 1)


def _chosen_by_name(entry: dict[str, object], path: str) -> dict[str, str | dict[str, int]]:
    """What an entry gives each value's name: an action, or an object of numbers of rows."""
    chosen: dict[str, str | dict[str, int]] = {}
    for key, names in entry.items():
        if key == "blocks":
            continue
        if key != _ROWS and key not in tuple(Action):
            raise RecordError(f"{path}: unknown key {key!r}")
        if not isinstance(names, dict if key == _ROWS else list):
            expected = "an object of numbers of rows by name" if key == _ROWS else "a list of names"
            raise RecordError(f"{path}.{key}: {expected} is expected")
        for name in names:
            if not isinstance(name, str) or name in chosen:
                raise RecordError(f"{path}.{key}: {name!r} is no name, or has an action already")
            chosen[name] = _counts(names[name], f"{path}.{key}.{name}") if isinstance(names, dict) else key
    return chosen


def _counts(rows: object, path: str) -> dict[str, int]:
    """How many rows do what, as ``_rows_to_plain`` writes it."""
    if not isinstance(rows, dict) or not rows.keys() <= set(Action):
        raise RecordError(f'{path}: an object like {{"recompute": 64, "swap": 192}} is expected')
    if not all(type(count) is int and count > 0 for count in rows.values()):
        raise RecordError(f"{path}: numbers of rows are whole and above 0; leave out what no row does")
    return rows


def _chosen_in_order(values: list[Value], chosen: dict[str, str | dict[str, int]], path: str) -> list[object]:
    decisions: list[object] = []
    for value in values:
        if value.name not in chosen:
            raise RecordError(f"{path}: no action for {value.name!r}")
        choice = chosen[value.name]
        if not isinstance(choice, str):
            decisions.append(_split_of(value, choice, f"{path}.{_ROWS}.{value.name}"))
            continue
        if choice not in value.actions:
            raise RecordError(f"{path}: {choice!r} is not allowed for {value.name!r}")
        decisions.append(choice)
    if len(chosen) != len(values):
        (other, *_) = sorted(set(chosen) - {value.name for value in values})
        raise RecordError(f"{path}: {other!r} is no saved value of these blocks")
    return decisions


def _split_of(value: Value, rows: dict[str, int], path: str) -> dict[str, int]:
    """The plain form of a ``Split``, if ``value`` may do what ``rows`` say."""
    if not value.num_rows:
        raise RecordError(f"{path}: the rows of {value.name!r} may not be divided")
    if sum(rows.values()) != value.num_rows:
        raise RecordError(f"{path}: {sum(rows.values())} rows; {value.name!r} has {value.num_rows}")
    if len(rows) == 1:
        (action,) = rows
        raise RecordError(f"{path}: all rows {action}: list {value.name!r} under {action!r}")
    for action in rows:
        if action not in value.actions:
            raise RecordError(f"{path}.{action}: not allowed for {value.name!r}")
    recomputed = rows.get(Action.RECOMPUTE, 0)
    if recomputed and recomputed not in value.splits:
        raise RecordError(f"{path}.recompute: {recomputed} is none of the first rows allowed: {list(value.splits)}")
    return {"recomputed": recomputed, "swapped": rows.get(Action.SWAP, 0)}
