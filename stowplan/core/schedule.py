"""A pipeline schedule is data: for each device, an ordered list of actions such as ``0F3``, ``5I1``, ``5W1``.

Stages are numbered along the model, microbatches along the batch. Everything else is a function of a schedule:
checking, simulating, searching (``stowplan.planner.schedule``), drawing, running. Nothing here says that a schedule can
be run: that is what ``stowplan.planner.schedule.check`` finds out.

Two forms as text, which both load again: a grid with a line for each device (``0: 0F0 0F1 0I0 ...``), and the CSV
that torch.distributed.pipelining calls ``compute_only``, with a row for each device and a cell for each action.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from stowplan.core.errors import InvalidArgument, InvalidSchedule

__all__ = ["Action", "Kind", "Schedule", "loop_placement", "v_placement"]


class Kind(StrEnum):
    """What is computed for one microbatch by one stage."""

    FORWARD = "F"
    INPUT_GRADIENT = "I"  # the gradient of the stage's input, which the stage before waits for
    WEIGHT_GRADIENT = "W"  # the gradients of the stage's parameters, for which nobody waits
    BACKWARD = "B"  # both at once


class Action(NamedTuple):
    """One stage's work on one microbatch, written as ``{stage}{kind}{microbatch}``."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that is written as ``text``, such as ``"5I1"``. Raises InvalidSchedule."""
        match = _ACTION.fullmatch(text.strip())
        if match is None:
            raise InvalidSchedule(
                f"{text!r} is no action: an action is a stage, one of F, I, W or B, and a microbatch, such as 0F3"
            )
        return cls(int(match[1]), Kind(match[2]), int(match[3]))


@dataclass(frozen=True, slots=True)
class Schedule:
    """What each device does, in order.

    Attributes:
        orders: the actions of each device, in the order in which it does them.
        stage_devices: the device of each stage.
        num_microbatches: microbatches of one step.
    """

    orders: tuple[tuple[Action, ...], ...]
    stage_devices: tuple[int, ...]
    num_microbatches: int

    @property
    def num_devices(self) -> int:
        return len(self.orders)

    @property
    def num_stages(self) -> int:
        return len(self.stage_devices)

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients have actions of their own, so that stages must put them off."""
        return any(action.kind is Kind.WEIGHT_GRADIENT for order in self.orders for action in order)

    def stages_of(self, device: int) -> tuple[int, ...]:
        """The stages that ``device`` holds, in the order of the model."""
        return tuple(stage for stage, holder in enumerate(self.stage_devices) if holder == device)

    @classmethod
    def of_orders(cls, orders: Iterable[Iterable[Action]]) -> Schedule:
        """The schedule with these ``orders``; a stage is placed where it is met first, stages and microbatches counted.

        Raises InvalidSchedule where there is no action at all, or none of a stage before the last one.
        """
        made = tuple(tuple(order) for order in orders)
        places: dict[int, int] = {}
        num_microbatches = 0
        for device, order in enumerate(made):
            for stage, _, microbatch in order:
                places.setdefault(stage, device)
                num_microbatches = max(num_microbatches, microbatch + 1)
        if not places:
            raise InvalidSchedule("this schedule is empty: it needs a line with actions for each device")
        if max(places) >= len(places):
            missing = next(stage for stage in range(len(places)) if stage not in places)
            raise InvalidSchedule(f"stage {missing} has no action, but stage {max(places)} has: give every stage some")
        return cls(made, tuple(places[stage] for stage in range(len(places))), num_microbatches)

    def joined(self) -> Schedule:
        """The same with every I turned into a B, and without W."""
        orders = [
            [
                Action(stage, Kind.BACKWARD if kind is Kind.INPUT_GRADIENT else kind, microbatch)
                for stage, kind, microbatch in order
                if kind is not Kind.WEIGHT_GRADIENT
            ]
            for order in self.orders
        ]
        return Schedule(tuple(map(tuple, orders)), self.stage_devices, self.num_microbatches)

    def to_text(self) -> str:
        """A grid: a line for each device, columns aligned by position (not by time)."""
        cells = [[str(action) for action in order] for order in self.orders]
        return _grid(cells, range(self.num_devices))

    __str__ = to_text

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """Read what ``to_text`` wrote; ``.`` is an idle cell, and skipped. Raises InvalidSchedule."""
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        orders = []
        for device, (number, line) in enumerate(lines):
            head, colon, cells = line.partition(":")
            if not colon or head.strip() != str(device):
                raise InvalidSchedule(f'line {number} does not begin with "{device}:", the number of its device')
            orders.append(_actions(cells.split(), number))
        return cls.of_orders(orders)

    def to_csv(self) -> str:
        """The CSV that torch's pipelining loads as ``compute_only``: a row for each device, a cell for each action."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([map(str, order) for order in self.orders])
        return out.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> Schedule:
        """Read such a CSV; empty cells are skipped. Raises InvalidSchedule with line and column."""
        rows = csv.reader(io.StringIO(text))
        return cls.of_orders([_actions(row, number) for number, row in enumerate(rows, start=1)])

    def save_csv(self, path: str | Path) -> None:
        """Write ``to_csv`` to a file."""
        Path(path).write_text(self.to_csv(), encoding="ascii")

    @classmethod
    def load_csv(cls, path: str | Path) -> Schedule:
        """Read a file that ``save_csv``, or torch, wrote. Raises InvalidSchedule; OSError if it cannot be read."""
        return cls.from_csv(Path(path).read_text(encoding="utf-8", errors="replace"))

    def excerpt(self, device: int, position: int) -> str:
        """The grid round one cell, which is marked: ``>5I1<``. A cell after the last action is drawn as ``>end<``."""
        first = max(0, position - _CELLS_AROUND)
        last = position + _CELLS_AROUND + 1
        devices = range(max(0, device - _LINES_AROUND), min(self.num_devices, device + _LINES_AROUND + 1))
        cells = [[str(action) for action in self.orders[line][first:last]] for line in devices]
        wrong = cells[device - devices[0]]
        if position < first + len(wrong):
            wrong[position - first] = f">{wrong[position - first]}<"
        else:
            wrong.append(">end<")
        if first:
            cells = [["...", *line] for line in cells]
        for line, number in zip(cells, devices, strict=True):
            if len(self.orders[number]) > last:
                line.append("...")
        return _grid(cells, devices)


def loop_placement(num_devices: int, stages_per_device: int = 1) -> tuple[int, ...]:
    """The device of each stage, where stages go round the devices: 0, 1, … p−1, 0, 1 and so on."""
    _refuse_no_count(num_devices=num_devices, stages_per_device=stages_per_device)
    return tuple(range(num_devices)) * stages_per_device


def v_placement(num_devices: int) -> tuple[int, ...]:
    """The device of each stage, where they go there and back: device i holds stages i and 2p−1−i."""
    _refuse_no_count(num_devices=num_devices)
    return (*range(num_devices), *reversed(range(num_devices)))


_ACTION = re.compile(r"([0-9]{1,9})([FIWB])([0-9]{1,9})")
_CELLS_AROUND, _LINES_AROUND = 4, 3  # of a marked cell


def _actions(cells: Sequence[str], number: int) -> list[Action]:
    actions = []
    for column, cell in enumerate(cells, start=1):
        if cell.strip() in ("", "."):
            continue
        try:
            actions.append(Action.parse(cell))
        except InvalidSchedule as error:
            raise InvalidSchedule(f"line {number}, cell {column}: {error}") from None
    return actions


def _grid(cells: Sequence[Sequence[str]], devices: range) -> str:
    width = max((len(cell) for line in cells for cell in line), default=0)
    head = len(str(devices[-1])) if devices else 0
    lines = zip(devices, cells, strict=True)
    return "".join(
        f"{device:>{head}}: {' '.join(cell.rjust(width) for cell in line)}".rstrip() + "\n" for device, line in lines
    )


def _refuse_no_count(**counts: int) -> None:
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise InvalidArgument(f"{name}={count!r} is no number of them: give an int from 1 up.")
