"""The schedules that have a name, and which stages they need.

gpipe, 1f1b and zb-h1 have one stage a device; interleaved has several, in a loop; v-min, v-half and v-zb have two, in
a V. 1F1B: PipeDream-Flush (arXiv 2006.09503); interleaved: Megatron-LM (arXiv 2104.04473), section 2.2; ZB-H1: "Zero
Bubble Pipeline Parallelism" (arXiv 2401.10241), section 3.1; the V shapes: see ``v_shapes``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stowplan.core.errors import InvalidArgument
from stowplan.core.schedule import Action, Kind, Schedule, loop_placement
from stowplan.planner.schedule.v_shapes import BLOCKS, v_schedule

__all__ = ["NAMES", "generate", "stages_per_device"]


def generate(name: str, num_devices: int, num_microbatches: int, *, num_chunks: int = 2) -> Schedule:
    """The schedule ``name`` of ``NAMES``; ``num_chunks`` are the stages a device of "interleaved".

    Raises InvalidArgument for another name, for counts below 1, and for "interleaved" with microbatches that do not
    come in whole rounds of ``num_devices``.
    """
    stages_per_device(name)
    if type(num_microbatches) is not int or num_microbatches < 1:
        raise InvalidArgument(f"num_microbatches={num_microbatches!r} is no number of them: give an int from 1 up.")
    placement = loop_placement(num_devices, num_chunks if name == "interleaved" else 1)
    if name in BLOCKS:
        return v_schedule(BLOCKS[name](num_devices), num_microbatches)
    if name == "interleaved":
        orders = [_interleaved(device, num_devices, num_microbatches, num_chunks) for device in range(num_devices)]
    else:
        orders = [tuple(_LINES[name](device, num_devices, num_microbatches)) for device in range(num_devices)]
    return Schedule(tuple(orders), placement, num_microbatches)


def stages_per_device(name: str) -> int:
    """How many stages a device of the schedule ``name`` holds. Raises InvalidArgument."""
    if name not in NAMES:
        raise InvalidArgument(f"{name!r} is no schedule that is known; allowed: {', '.join(NAMES)}.")
    return 1 if name in _LINES else 2


def _gpipe(device: int, num_devices: int, num_microbatches: int) -> Iterator[Action]:
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        for microbatch in range(num_microbatches):
            yield Action(device, kind, microbatch)


def _one_forward_one_backward(device: int, num_devices: int, num_microbatches: int) -> Iterator[Action]:
    num_warm_up = num_devices - 1 - device
    for microbatch in range(num_microbatches + num_warm_up):
        if microbatch < num_microbatches:
            yield Action(device, Kind.FORWARD, microbatch)
        if microbatch >= num_warm_up:
            yield Action(device, Kind.BACKWARD, microbatch - num_warm_up)


def _zero_bubble(device: int, num_devices: int, num_microbatches: int) -> Iterator[Action]:
    """1F1B whose weight gradients come ``device`` microbatches later, which leaves every device p activations."""
    num_warm_up = num_devices - 1 - device
    for microbatch in range(num_microbatches + num_warm_up + device):
        if microbatch < num_microbatches:
            yield Action(device, Kind.FORWARD, microbatch)
        if 0 <= microbatch - num_warm_up < num_microbatches:
            yield Action(device, Kind.INPUT_GRADIENT, microbatch - num_warm_up)
        if microbatch >= num_warm_up + device:
            yield Action(device, Kind.WEIGHT_GRADIENT, microbatch - num_warm_up - device)


def _interleaved(device: int, num_devices: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """Rounds of p microbatches go through all chunks: the first p through chunk 0, then through chunk 1, and so on."""
    if num_microbatches % num_devices:
        lower = num_microbatches // num_devices * num_devices
        allowed = f"{lower} or {lower + num_devices}" if lower else f"{num_devices}"
        raise InvalidArgument(
            f"num_microbatches={num_microbatches} does not come in whole rounds of {num_devices} devices, which "
            f"interleaved 1F1B needs: give {allowed}."
        )
    forward, backward = [], []
    for first in range(0, num_microbatches, num_devices):
        for chunk in range(num_chunks):
            for microbatch in range(first, first + num_devices):
                forward.append(Action(chunk * num_devices + device, Kind.FORWARD, microbatch))
                backward.append(
                    Action((num_chunks - 1 - chunk) * num_devices + device, Kind.BACKWARD, microbatch),
                )
    num_warm_up = min(2 * (num_devices - device - 1) + (num_chunks - 1) * num_devices, len(forward))
    order = forward[:num_warm_up]
    for one_forward, one_backward in zip(forward[num_warm_up:], backward, strict=False):
        order += [one_forward, one_backward]
    return (*order, *backward[len(forward) - num_warm_up :])


_LINES: dict[str, Callable[[int, int, int], Iterator[Action]]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "zb-h1": _zero_bubble,
}
NAMES = (*_LINES, "interleaved", *BLOCKS)
