"""Whether a schedule can be run: found out action by action, from nothing but the schedule itself.

This shares no code with what makes schedules or simulates them. A schedule that passes ends on devices that do one
action after the other, wait for what comes from others, and send without waiting.
"""

from __future__ import annotations

from stowplan.core.errors import InvalidSchedule
from stowplan.core.schedule import Action, Kind, Schedule
from stowplan.core.units import format_bytes
from stowplan.planner.schedule.costs import Costs

__all__ = ["activation_peaks", "check", "check_bytes", "order_peaks_bytes"]

_F, _I, _W, _B = Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.BACKWARD
_LONGEST_CYCLE = 4  # of waiting devices that a message has


def check(schedule: Schedule, *, limit_microbatches: int | None = None) -> None:
    """Raise InvalidSchedule, with the wrong cell marked in the grid, unless ``schedule`` can be run as it is.

    Every stage does the forward pass of every microbatch once, and its backward pass once: B, or I and later W; on the
    device that holds it, after its own forward pass; and no device waits for ever.

    With ``limit_microbatches`` no device may hold more activations than that many microbatches leave there: each of
    its stages holds one from the start of F to the end of W or B.
    """
    _check_places(schedule)
    _check_each_once(schedule)
    _check_progress(schedule)
    if limit_microbatches is not None:
        _check_limit(schedule, limit_microbatches)


def check_bytes(schedule: Schedule, costs: Costs, limit_bytes: int) -> None:
    """Raise InvalidSchedule where ``order_peaks_bytes`` of a device is above ``limit_bytes``."""
    for device in range(schedule.num_devices):
        peak, position = _order_peak(schedule, costs, device)
        if peak > limit_bytes:
            problem = f"{format_bytes(peak)} are needed here, more than the limit of {format_bytes(limit_bytes)}"
            raise _wrong(schedule, problem, device, position)


def activation_peaks(schedule: Schedule) -> list[int]:
    """The most activations that each device holds at once; a microbatch leaves one in each of its stages."""
    return [_activation_peak(schedule, device)[0] for device in range(schedule.num_devices)]


def order_peaks_bytes(schedule: Schedule, costs: Costs) -> list[int]:
    """The highest bytes of each device, whatever the times: static, held and transient ones, but no buffers."""
    return [_order_peak(schedule, costs, device)[0] for device in range(schedule.num_devices)]


def _wrong(schedule: Schedule, problem: str, device: int, position: int) -> InvalidSchedule:
    grid = schedule.excerpt(device, position)
    return InvalidSchedule(f"{problem} (device {device}, position {position})", device, position, grid)


def _check_places(schedule: Schedule) -> None:
    num_stages, num_microbatches, devices = schedule.num_stages, schedule.num_microbatches, schedule.stage_devices
    for device in range(schedule.num_devices):
        if device not in devices:
            raise _wrong(schedule, f"device {device} holds no stage", device, 0)
    if not set(devices) <= set(range(schedule.num_devices)):
        raise InvalidSchedule(f"stage_devices={devices} has more devices than there are orders: {schedule.num_devices}")
    for device, order in enumerate(schedule.orders):
        for position, action in enumerate(order):
            stage, _, microbatch = action
            if not (0 <= stage < num_stages and 0 <= microbatch < num_microbatches):
                allowed = f"stages 0 to {num_stages - 1} and microbatches 0 to {num_microbatches - 1}"
                raise _wrong(schedule, f"{action} is not of this pipeline, which has {allowed}", device, position)
            if devices[stage] != device:
                raise _wrong(schedule, f"{action} is of a stage that device {devices[stage]} holds", device, position)


# What a stage has done of a microbatch.
_NOTHING, _FORWARD, _INPUT, _ALL = range(4)
_STEPS = {(_NOTHING, _F): _FORWARD, (_FORWARD, _I): _INPUT, (_FORWARD, _B): _ALL, (_INPUT, _W): _ALL}


def _check_each_once(schedule: Schedule) -> None:
    num_microbatches = schedule.num_microbatches
    state = bytearray(schedule.num_stages * num_microbatches)
    for device, order in enumerate(schedule.orders):
        for position, (stage, kind, microbatch) in enumerate(order):
            cell = stage * num_microbatches + microbatch
            after = _STEPS.get((state[cell], kind))
            if after is None:
                problem = _misplaced(Action(stage, kind, microbatch), state[cell])
                raise _wrong(schedule, problem, device, position)
            state[cell] = after
    for cell, done in enumerate(state):
        if done != _ALL:
            stage, microbatch = divmod(cell, num_microbatches)
            missing = {_NOTHING: "F", _FORWARD: "B (or I and W)", _INPUT: "W"}[done]
            device = schedule.stage_devices[stage]
            problem = f"stage {stage} never does {missing} of microbatch {microbatch}"
            raise _wrong(schedule, problem, device, len(schedule.orders[device]))


def _misplaced(action: Action, state: int) -> str:
    if action.kind is _F:
        return f"{action} is there twice"
    if state == _NOTHING:
        return f"{action} comes before {action._replace(kind=_F)}"
    if state == _ALL:
        return f"{action} comes after the backward pass of this microbatch is over"
    if action.kind is _W:
        return f"{action} comes before {action._replace(kind=_I)}"
    return f"{action} computes the input's gradient a second time"


def _check_progress(schedule: Schedule) -> None:
    """Do what can be done, in order, until all is done or every device waits."""
    num_microbatches, last_stage = schedule.num_microbatches, schedule.num_stages - 1
    forward, backward = (bytearray(schedule.num_stages * num_microbatches) for _ in range(2))
    orders, positions = schedule.orders, [0] * schedule.num_devices
    waiting_for: tuple[dict[int, int], dict[int, int]] = {}, {}  # the cell, forward or backward -> who waits
    running = list(range(schedule.num_devices))
    while running:
        device = running.pop()
        order = orders[device]
        position = positions[device]
        while position < len(order):
            stage, kind, microbatch = order[position]
            cell = stage * num_microbatches + microbatch
            if kind is _F:
                if stage and not forward[cell - num_microbatches]:
                    waiting_for[0][cell - num_microbatches] = device
                    break
                forward[cell] = 1
                woken = waiting_for[0].pop(cell, None)
            elif kind is _W:
                woken = None
            else:
                if stage < last_stage and not backward[cell + num_microbatches]:
                    waiting_for[1][cell + num_microbatches] = device
                    break
                backward[cell] = 1
                woken = waiting_for[1].pop(cell, None)
            if woken is not None:
                running.append(woken)
            position += 1
        positions[device] = position
    stuck = [device for device in range(schedule.num_devices) if positions[device] < len(orders[device])]
    if stuck:
        cycle = _cycle(schedule, positions, stuck[0])
        first = min(cycle)
        raise _wrong(schedule, _told_cycle(schedule, positions, cycle), first, positions[first])


def _waits_for(schedule: Schedule, action: Action) -> tuple[int, int]:
    """(device, stage) of what the first action that cannot run needs from elsewhere."""
    stage = action.stage - 1 if action.kind is _F else action.stage + 1
    return schedule.stage_devices[stage], stage


def _cycle(schedule: Schedule, positions: list[int], device: int) -> list[int]:
    """Devices of which each waits for the next, and the last for the first; a device may wait for itself."""
    seen: list[int] = []
    while device not in seen:
        seen.append(device)
        device, _ = _waits_for(schedule, schedule.orders[device][positions[device]])
    return seen[seen.index(device) :]


def _told_cycle(schedule: Schedule, positions: list[int], cycle: list[int]) -> str:
    told = []
    for device in cycle[:_LONGEST_CYCLE]:
        action = schedule.orders[device][positions[device]]
        holder, stage = _waits_for(schedule, action)
        needed = f"{stage}{'F' if action.kind is _F else 'I (or B)'} of microbatch {action.microbatch}"
        told.append(f"device {device} waits in {action} for {needed} from device {holder}")
    more = f"; and {len(cycle) - len(told)} more" if len(cycle) > len(told) else ""
    return f"deadlock: {'; '.join(told)}{more}"


def _check_limit(schedule: Schedule, limit_microbatches: int) -> None:
    for device in range(schedule.num_devices):
        peak, position = _activation_peak(schedule, device)
        limit = limit_microbatches * len(schedule.stages_of(device))
        if peak > limit:
            raise _wrong(
                schedule,
                f"device {device} holds {peak} activations here, more than the {limit} of {limit_microbatches} "
                f"microbatches",
                device,
                position,
            )


def _activation_peak(schedule: Schedule, device: int) -> tuple[int, int]:
    """(activations, the first position where there are so many)."""
    held = peak = place = 0
    for position, (_, kind, _) in enumerate(schedule.orders[device]):
        if kind is _F:
            held += 1
            if held > peak:
                peak, place = held, position
        elif kind is not _I:
            held -= 1
    return peak, place


def _order_peak(schedule: Schedule, costs: Costs, device: int) -> tuple[int, int]:
    """(bytes, the first position where there are so many)."""
    held = sum(costs.stages[stage].static_bytes for stage in schedule.stages_of(device))
    peak = place = 0
    for position, (stage, kind, _) in enumerate(schedule.orders[device]):
        during, after = _action_bytes(costs, stage, kind)
        if held + during > peak:
            peak, place = held + during, position
        held += after
    return peak, place


def _action_bytes(costs: Costs, stage: int, kind: Kind) -> tuple[int, int]:
    """(at most in addition while it runs, what has changed after it). B runs I and then W."""
    cost = costs.stages[stage]
    forward, input_gradient, weight_gradient = cost.transient_bytes
    added = cost.input_gradient_bytes
    if kind is _F:
        return cost.forward_bytes + forward, cost.forward_bytes
    if kind is _I:
        return max(added, 0) + input_gradient, added
    if kind is _W:
        return weight_gradient, -cost.forward_bytes - added
    return max(max(added, 0) + input_gradient, added + weight_gradient), -cost.forward_bytes
