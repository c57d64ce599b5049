"""A tape as a core program, once it is known what the rest of the model does with the block's inputs and outputs."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from typing import NamedTuple

from stowplan.core.program import Action, Op, Value
from stowplan.offload.tape.course import allowed_actions
from stowplan.offload.tape.rows import num_tokens, row_bytes, row_wise, splits_of
from stowplan.offload.tape.tape import Origin, Tape, TapeOp

__all__ = ["Casts", "Surroundings", "single_assignment"]


class Casts(Enum):
    """Who holds the copies of a block's weights that autocast caches: later calls of the block take the first one's."""

    OWN = "own"
    SHARED = "shared"  # this call makes them, others use them: moving them would save nothing
    THERE = "there"  # a call before made them and counts them


class Surroundings(NamedTuple):
    """What the rest of the model does with a call's inputs and outputs, by position.

    ``shared`` arguments are on the device during the call whatever it does: they are not its own. Of those, ``loose``
    ones are held by nobody afterwards, so that a replay that starts from them has to. ``held_outputs`` are held, and
    their bytes counted, by others.
    """

    shared: frozenset[int] = frozenset()
    loose: frozenset[int] = frozenset()
    held_outputs: frozenset[int] = frozenset()
    casts: Casts = Casts.OWN


def single_assignment(
    tape: Tape, around: Surroundings, held: Collection[int]
) -> tuple[tuple[Value, ...], tuple[Op, ...]]:
    """Values and ops for the planner: parameters and shared inputs left out, a value's versions told apart.

    ``held`` values count no bytes here and stay where they are: others hold them. Values that are not saved have
    ``num_rows`` and ``splits`` too: the first rows that their op makes alone on the way to a recomputation.
    """
    absent = around.shared - around.loose
    allowed = allowed_actions(tape)
    num_rows = num_tokens(tape)
    splits = splits_of(tape, row_wise(tape, num_rows), allowed)
    numbers: dict[tuple[int, int], int] = {}
    values: list[Value] = []
    for number, value in enumerate(tape.values):
        is_input = value.origin is Origin.INPUT and value.position not in absent
        if value.origin is not Origin.MADE and not is_input:
            continue
        if value.lingers and around.casts is Casts.THERE:
            continue
        for version, writer in enumerate(value.writers):
            last = version == value.last_version
            actions = allowed.get(number, ()) if last else ()
            if number in held or (value.lingers and around.casts is Casts.SHARED):
                actions = actions[:1]
            divided = last and actions != (Action.KEEP,) and row_bytes(value, num_rows) > 0
            numbers[number, version] = len(values)
            values.append(
                Value(
                    name=value.name if last else f"{value.name}@{version}",
                    size_bytes=value.size_bytes if last and number not in held else 0,
                    producer=writer,
                    actions=actions,
                    shape=value.geometry.size,
                    dtype=str(value.geometry.dtype).removeprefix("torch."),
                    num_rows=num_rows if divided else 0,
                    splits=splits.get(number, ()) if divided and (not actions or Action.RECOMPUTE in actions) else (),
                    lingers=value.lingers,
                )
            )
    ops = tuple(_core_op(op, tape, numbers) for op in tape.ops)
    return tuple(values), ops


def _core_op(op: TapeOp, tape: Tape, numbers: dict[tuple[int, int], int]) -> Op:
    makes = [(value, 0) for _, value in op.makes]
    return Op(
        name=op.func._schema.name,
        inputs=tuple(dict.fromkeys(numbers[key] for key in op.reads if key in numbers)),
        outputs=tuple(numbers[key] for key in (*makes, *op.writes) if key in numbers),
        seconds=op.seconds,
        flops=op.flops,
        workspace_bytes=op.workspace_bytes,
        replayable=op.replayable and not any(tape.values[value].opaque for value, _ in makes),
        causal_attention="scaled_dot_product" in op.func._schema.name and _is_causal(op),
    )


def _is_causal(op: TapeOp) -> bool:
    for position, argument in enumerate(op.func._schema.arguments):
        if argument.name == "is_causal":
            return bool(op.kwargs.get("is_causal", op.args[position] if position < len(op.args) else False))
    return False
