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
from stowplan.core.schedule import Schedule
from stowplan.planner.schedule.coding import B, F, I, W, encode
from stowplan.planner.schedule.costs import Costs

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
    memory = _memory(schedule, costs, codes, begins, end_of)
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
    schedule: Schedule, costs: Costs, codes: list[Integers], begins: tuple[Floats, ...], end_of: Floats
) -> tuple[Memory, ...]:
    m = schedule.num_microbatches
    begin_of = np.empty(len(end_of))
    for order, begin in zip(codes, begins, strict=True):
        begin_of[order] = begin
    during, after = _changes(costs)
    on_the_way = _Transfers(schedule, costs, begin_of, end_of) if any(s.input_bytes for s in costs.stages) else None
    made = []
    for device, order in enumerate(codes):
        static = sum(costs.stages[stage].static_bytes for stage in schedule.stages_of(device))
        times = [np.zeros(1), begins[device], end_of[order]]
        rows = order // m
        changes = [np.array([static]), during[rows], after[rows] - during[rows]]
        for first, last, size in on_the_way.of(device) if on_the_way else ():
            times += [first, last]
            changes += [np.full(m, size), np.full(m, -size)]
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


class _Transfers:
    """Buffers of tensors between stages: activations until the next stage begins, gradients until it has used them."""

    def __init__(self, schedule: Schedule, costs: Costs, begin_of: Floats, end_of: Floats) -> None:
        self.schedule, self.costs = schedule, costs
        shape = (4, schedule.num_stages, schedule.num_microbatches)
        self.begins, self.ends = begin_of.reshape(shape), end_of.reshape(shape)

    def of(self, device: int) -> Iterator[tuple[Floats, Floats, int]]:
        """(from when, until when, float64 [microbatch], bytes) of each kind of tensor that ``device`` holds."""
        devices = self.schedule.stage_devices
        for stage in range(1, len(devices)):
            size = self.costs.stages[stage].input_bytes
            forward = self.ends[F, stage - 1], self.begins[F, stage]
            backward = self.ends[I, stage], self.ends[I, stage - 1]
            for (sent, used), sender, receiver in (
                (forward, devices[stage - 1], devices[stage]),
                (backward, devices[stage], devices[stage - 1]),
            ):
                if receiver == device:
                    ahead = self.costs.receives_ahead and sender != receiver
                    whole_step = np.zeros_like(sent), np.full_like(sent, self.ends.max())
                    yield (*(whole_step if ahead else (sent, used)), size)
                elif sender == device:
                    yield sent, sent + self.costs.communication_seconds, size
