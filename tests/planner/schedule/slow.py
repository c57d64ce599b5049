"""A second simulator, as plain as can be: it knows when actions end, never how a schedule is coded."""

from __future__ import annotations

from stowplan.core.schedule import Action, Kind, Schedule
from stowplan.planner.schedule import Costs

F, I, W, B = Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.BACKWARD  # noqa: E741


def seconds(costs: Costs, action: Action) -> float:
    forward, input_gradient, weight_gradient = costs.stages[action.stage].seconds
    return {F: forward, I: input_gradient, W: weight_gradient, B: input_gradient + weight_gradient}[action.kind]


def ends(schedule: Schedule, costs: Costs) -> dict[Action, float]:
    """When each action ends: relaxed again and again, until nothing changes any more."""
    found: dict[Action, float] = {}
    changed = True
    while changed:
        changed = False
        for device, order in enumerate(schedule.orders):
            now = 0.0
            for action in order:
                stage, kind, microbatch = action
                needed = []
                if kind is F and stage:
                    needed = [Action(stage - 1, F, microbatch)]
                elif kind in (I, B) and stage < schedule.num_stages - 1:
                    needed = [Action(stage + 1, other, microbatch) for other in (I, B)]
                there = [other for other in needed if other in found]
                if needed and not there:
                    break
                for other in there:
                    far = schedule.stage_devices[other.stage] != device
                    now = max(now, found[other] + far * costs.communication_seconds)
                now += seconds(costs, action)
                if found.get(action) != now:
                    found[action] = now
                    changed = True
    assert len(found) == sum(map(len, schedule.orders)), "deadlock"
    return found


def peak_bytes(schedule: Schedule, costs: Costs, device: int) -> int:
    """The most bytes of ``device`` at any moment, summed anew at each begin of an action there or an arrival."""
    end = ends(schedule, costs)
    begin = {action: when - seconds(costs, action) for action, when in end.items()}
    spans: list[tuple[float, float, int]] = []  # from, to, bytes
    last = max(end.values())
    for stage in schedule.stages_of(device):
        cost = costs.stages[stage]
        for microbatch in range(schedule.num_microbatches):
            forward = Action(stage, F, microbatch)
            full = Action(stage, B, microbatch)
            split = full not in end
            first, final = (Action(stage, I, microbatch), Action(stage, W, microbatch)) if split else (full, full)
            spans.append((begin[forward], end[final], cost.forward_bytes))
            spans.append((begin[forward], end[forward], cost.transient_bytes[0]))
            added = cost.input_gradient_bytes
            if split:
                spans.append((begin[first], end[first], max(added, 0) + cost.transient_bytes[1]))
                spans.append((end[first], end[final], added))
                spans.append((begin[final], end[final], cost.transient_bytes[2]))
            else:
                both = max(max(added, 0) + cost.transient_bytes[1], added + cost.transient_bytes[2])
                spans.append((begin[full], end[full], both))
    spans += _buffers(schedule, costs, device, begin, end)
    moments = sorted({when for span in spans for when in span[:2] if when < last})
    # Looked at in the middle of each stretch: rounding cannot put the end of a span after the begin of the next there.
    middles = [(a + b) / 2 for a, b in zip(moments, [*moments[1:], last], strict=True) if b - a > 1e-9]
    static = sum(costs.stages[stage].static_bytes for stage in schedule.stages_of(device))
    return static + max(sum(size for start, stop, size in spans if start <= when < stop) for when in middles)


def _buffers(
    schedule: Schedule, costs: Costs, device: int, begin: dict[Action, float], end: dict[Action, float]
) -> list[tuple[float, float, int]]:
    def backward(stage: int, microbatch: int) -> Action:
        split = Action(stage, I, microbatch)
        return split if split in end else Action(stage, B, microbatch)

    tensors = []  # who makes it, who uses it, its bytes
    for stage in range(1, schedule.num_stages):
        size = costs.stages[stage].input_bytes
        for microbatch in range(schedule.num_microbatches):
            tensors.append((Action(stage - 1, F, microbatch), Action(stage, F, microbatch), size))
            tensors.append((backward(stage, microbatch), backward(stage - 1, microbatch), size))
    spans = []
    last = max(end.values())
    for maker, user, size in tensors:
        sender, receiver = schedule.stage_devices[maker.stage], schedule.stage_devices[user.stage]
        if sender == receiver == device:
            spans.append((end[maker], begin[user], size))
        if sender == receiver or device not in (sender, receiver):
            continue
        order = schedule.orders[receiver]
        behind = [  # on the same channel, not before this one
            order.index(other_user)
            for other_maker, other_user, _ in tensors
            if (schedule.stage_devices[other_maker.stage], schedule.stage_devices[other_user.stage])
            == (sender, receiver)
            and end[other_maker] >= end[maker]
        ]
        before = min(behind) - 2  # the action after whose end there is room
        posted = end[order[before]] if before >= 0 else 0.0
        if device == sender:
            spans.append((end[maker], max(end[maker], posted) + costs.communication_seconds, size))
        elif costs.receives_ahead:
            spans.append((0.0, last, size))
        else:
            spans.append((posted, begin[user], size))
    return spans
