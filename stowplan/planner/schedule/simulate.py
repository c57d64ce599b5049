"""When each action begins and ends, how long devices idle, and what they hold over time.

Devices do their actions in order and wait for what comes from others; tensors travel while devices compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt

from stowplan.core.errors import InvalidArgument, InvalidSchedule
from stowplan.core.schedule import Action, Kind, Schedule
from stowplan.planner.schedule.coding import B, F, I, W, encode
from stowplan.planner.schedule.costs import Costs
from stowplan.planner.schedule.messages import channels

__all__ = ["Memory", "Rows", "Timeline", "run_codes", "simulate"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Memory:
    """Bytes of one device over time: ``levels[k]`` from ``times[k]`` to ``times[k + 1]``, the last until the end."""

    times: Floats
    levels: Integers

    @property
    def peak_bytes(self) -> int:
        return int(self.levels.max())


@dataclass(frozen=True, eq=False)
class Timeline:
    """A schedule under costs.

    Attributes:
        begins, ends: seconds of each action, float64 [action], for each device, in its order.
        memory: bytes of each device over time: static, held, transient ones, and buffers of tensors on their way.
        step_seconds: when the last action of all ends.
    """

    schedule: Schedule
    costs: Costs
    begins: tuple[Floats, ...]
    ends: tuple[Floats, ...]
    memory: tuple[Memory, ...]
    step_seconds: float

    @property
    def work_seconds(self) -> list[float]:
        """How long each device computes."""
        m = self.schedule.num_microbatches
        of_stage = [m * stage.work_seconds for stage in self.costs.stages]
        return [
            sum(of_stage[stage] for stage in self.schedule.stages_of(device))
            for device in range(self.schedule.num_devices)
        ]

    @property
    def idle_seconds(self) -> list[float]:
        """How long each device does not compute: its bubble."""
        return [self.step_seconds - work for work in self.work_seconds]

    @property
    def bubble_seconds(self) -> float:
        """By how much the step is longer than the work of the device that has most."""
        return self.step_seconds - max(self.work_seconds)

    @property
    def bubble_rate(self) -> float:
        """``bubble_seconds`` as a share of the step."""
        return self.bubble_seconds / self.step_seconds

    @property
    def peaks_bytes(self) -> list[int]:
        """The highest bytes of each device."""
        return [memory.peak_bytes for memory in self.memory]


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Run ``schedule``, which ``check`` has passed, in thought.

    Raises InvalidArgument where ``costs`` have another number of stages, InvalidSchedule where it cannot end.
    """
    if len(costs.stages) != schedule.num_stages:
        raise InvalidArgument(
            f"costs have {len(costs.stages)} stages, the schedule has {schedule.num_stages}: give costs of each of "
            f"its stages (Costs.merged makes fewer of more)."
        )
    rows = Rows(schedule.stage_devices, schedule.num_microbatches, costs)
    orders = encode(schedule)
    found = run_codes(orders, rows)
    if found is None:
        raise InvalidSchedule("this schedule never ends: devices wait for each other. check(schedule) shows where")
    end_of = np.array(found)
    codes = [np.array(order, dtype=np.int64) for order in orders]
    ends = tuple(end_of[order] for order in codes)
    begins = tuple(map(rows.begins, codes, ends, repeat(end_of)))
    memory = _memory(schedule, costs, codes, begins, ends)
    return Timeline(schedule, costs, begins, ends, memory, max(float(end[-1]) for end in ends))


class Rows:
    """Tables by ``code // num_microbatches``: seconds, the code that is waited for (relative, or 0), and its delay."""

    def __init__(self, stage_devices: tuple[int, ...], num_microbatches: int, costs: Costs) -> None:
        self.num_microbatches = num_microbatches
        self.num_stages = num_stages = len(stage_devices)
        stages = costs.stages
        self.seconds = [stage.seconds[kind] for kind in (F, I, W) for stage in stages]
        self.seconds += [stage.input_gradient_seconds + stage.weight_gradient_seconds for stage in stages]
        self.needs, self.delays = [0] * (4 * num_stages), [0.0] * (4 * num_stages)
        for stage in range(num_stages - 1):
            near = stage_devices[stage] == stage_devices[stage + 1]
            for kind, at in ((F, stage + 1), (I, stage), (B, stage)):
                row = kind * num_stages + at
                self.delays[row] = 0.0 if near else costs.communication_seconds
                self.needs[row] = -num_microbatches if kind == F else num_microbatches
                if kind == B:
                    self.needs[row] -= 2 * num_stages * num_microbatches  # to where I of the next stage is

    def begins(self, codes: Integers, ends: Floats, end_of: Floats) -> Floats:
        """When the actions of one device begin: when the one before ends, or what they wait for arrives."""
        kinds = codes // self.num_microbatches
        needs = np.array(self.needs)[kinds]
        arrivals = np.where(needs != 0, end_of[codes + needs] + np.array(self.delays)[kinds], 0.0)
        begins: Floats = np.maximum(arrivals, np.concatenate([[0.0], ends[:-1]]))
        return begins


def run_codes(orders: list[list[int]], rows: Rows) -> list[float] | None:
    """When the action of each code ends (that of B also under the code of I), or None where devices wait for ever.

    Each device goes on until it has to wait; who ends an action wakes the device that waits for it.
    """
    m, num_stages = rows.num_microbatches, rows.num_stages
    num_cells = num_stages * m
    first_b = 3 * num_cells
    needs, delays, seconds = rows.needs, rows.delays, rows.seconds
    ends: list[float] = [-1.0] * (4 * num_cells)
    waiting: dict[int, int] = {}
    positions, now = [0] * len(orders), [0.0] * len(orders)
    running = list(range(len(orders)))
    left = sum(map(len, orders))
    while running:
        device = running.pop()
        order, time, begin = orders[device], now[device], positions[device]
        position = begin
        for position in range(begin, len(order)):
            code = order[position]
            row = code // m
            need = needs[row]
            if need:
                arrival = ends[code + need]
                if arrival < 0:
                    waiting[code + need] = device
                    break
                arrival += delays[row]
                if arrival > time:  # noqa: PLR1730 - a call would take longer than all else here
                    time = arrival
            time += seconds[row]
            ends[code] = time
            if code >= first_b:
                code -= 2 * num_cells
                ends[code] = time
            if code in waiting:
                running.append(waiting.pop(code))
        else:
            position = len(order)
        left -= position - begin
        positions[device], now[device] = position, time
    return None if left else ends


def _memory(
    schedule: Schedule, costs: Costs, codes: list[Integers], begins: tuple[Floats, ...], ends: tuple[Floats, ...]
) -> tuple[Memory, ...]:
    m = schedule.num_microbatches
    during, after = _changes(costs)
    buffers = _Buffers(schedule, costs, begins, ends) if any(stage.input_bytes for stage in costs.stages) else None
    made = []
    for device, order in enumerate(codes):
        static = sum(costs.stages[stage].static_bytes for stage in schedule.stages_of(device))
        times = [np.zeros(1), begins[device], ends[device]]
        rows = order // m
        changes = [np.array([static]), during[rows], after[rows] - during[rows]]
        for first, last, sizes in buffers.of(device) if buffers else ():
            times += [first, last]
            changes += [sizes, -sizes]
        made.append(_levels(np.concatenate(times), np.concatenate(changes)))
    return tuple(made)


def _levels(times: Floats, changes: Integers) -> Memory:
    """The sum of all changes up to each time; what happens at one time is one change."""
    order = np.argsort(times, kind="stable")
    times = times[order]
    last = np.append(times[1:] != times[:-1], True)
    return Memory(times[last], np.cumsum(changes[order])[last])


def _changes(costs: Costs) -> tuple[Integers, Integers]:
    """(bytes that come with the begin of an action, what remains of them after its end), by kind and stage."""
    during, after = [], []
    for kind in (F, I, W, B):
        for stage in costs.stages:
            held, added = stage.forward_bytes, stage.input_gradient_bytes
            of_forward, of_input, of_weight = stage.transient_bytes
            while_input = max(added, 0) + of_input
            during.append((held + of_forward, while_input, of_weight, max(while_input, added + of_weight))[kind])
            after.append((held, added, -held - added, -held)[kind])
    return np.array(during, dtype=np.int64), np.array(after, dtype=np.int64)


class _Buffers:
    """Buffers of tensors between stages: on their receiver, and on their sender until they have been received."""

    def __init__(self, schedule: Schedule, costs: Costs, begins: tuple[Floats, ...], ends: tuple[Floats, ...]) -> None:
        self.schedule, self.costs, self.begins, self.ends = schedule, costs, begins, ends
        self.channels = channels(schedule)
        self.sizes = np.array([stage.input_bytes for stage in costs.stages], dtype=np.int64)
        self.last = max(float(end[-1]) for end in ends)

    def of(self, device: int) -> Iterator[tuple[Floats, Floats, Integers]]:
        """(from when, until when, bytes) of all tensors that ``device`` sends, receives, or hands to itself."""
        for channel in self.channels:
            if device not in (channel.source, channel.target):
                continue
            sizes = self.sizes[channel.stages + channel.gradients]
            sent = self.ends[channel.source][channel.sent]
            posted = np.concatenate([[0.0], self.ends[channel.target]])[channel.posted]
            if device == channel.source:
                yield sent, np.maximum(sent, posted) + self.costs.communication_seconds, sizes
            elif self.costs.receives_ahead:
                yield np.zeros_like(posted), np.full_like(posted, self.last), sizes
            else:
                yield posted, self.begins[device][channel.used], sizes
        places = self._own(device)
        if places is not None:
            made, used, stages = places
            yield self.ends[device][made], self.begins[device][used], self.sizes[stages]

    def _own(self, device: int) -> tuple[Integers, Integers, Integers] | None:
        """(position that makes it, position that uses it, stage whose input or its gradient it is)."""
        devices = self.schedule.stage_devices
        turns = {stage for stage in range(1, len(devices)) if devices[stage - 1] == devices[stage] == device}
        if not turns:
            return None
        place = {action: number for number, action in enumerate(self.schedule.orders[device])}
        found = []
        for (stage, kind, microbatch), number in place.items():
            if kind is Kind.FORWARD and stage in turns:
                found.append((place[Action(stage - 1, kind, microbatch)], number, stage))
            elif kind in (Kind.INPUT_GRADIENT, Kind.BACKWARD) and stage + 1 in turns:
                above = Action(stage + 1, Kind.INPUT_GRADIENT, microbatch)
                if above not in place:
                    above = Action(stage + 1, Kind.BACKWARD, microbatch)
                found.append((place[above], number, stage + 1))
        made, used, stages = np.array(found, dtype=np.int64).T
        return made, used, stages
