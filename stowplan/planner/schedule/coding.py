"""Actions as whole numbers, for the loops that see each of them.

The code of an action is ``(kind · num_stages + stage) · num_microbatches + microbatch``. So the forward pass that F
waits for is ``num_microbatches`` below it, and the input gradient that I waits for as many above it;
``code // num_microbatches`` is the row of kind and stage in tables of seconds and bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stowplan.core.schedule import Action, Kind, Schedule

__all__ = ["B", "F", "I", "KINDS", "W", "decode", "encode"]

KINDS = (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.BACKWARD)
F, I, W, B = range(4)  # noqa: E741
_NUMBER_OF = {kind: number for number, kind in enumerate(KINDS)}


def encode(schedule: Schedule) -> list[list[int]]:
    """The orders of ``schedule``, whose stages and microbatches are within range, as codes."""
    num_stages, num_microbatches = schedule.num_stages, schedule.num_microbatches
    first_of = {kind: number * num_stages * num_microbatches for kind, number in _NUMBER_OF.items()}
    return [
        [first_of[kind] + stage * num_microbatches + microbatch for stage, kind, microbatch in order]
        for order in schedule.orders
    ]


def decode(orders: Iterable[Sequence[int]], stage_devices: tuple[int, ...], num_microbatches: int) -> Schedule:
    """The schedule whose orders are these codes."""
    num_stages = len(stage_devices)
    heads = [(stage, kind) for kind in KINDS for stage in range(num_stages)]
    new = tuple.__new__  # three times as fast as Action(...), and there may be 100,000 of them
    made = []
    for order in orders:
        actions = []
        for code in order:
            row, microbatch = divmod(code, num_microbatches)
            stage, kind = heads[row]
            actions.append(new(Action, (stage, kind, microbatch)))
        made.append(tuple(actions))
    return Schedule(tuple(made), stage_devices, num_microbatches)
