"""Which tensors go from device to device, in which order, and when their receivers make room for them.

All tensors from one device to another travel on one channel, in the order in which they are sent: that is how
collective libraries match them. So buffers are asked for in that order, too, and each one action before the first
tensor that is needed of it and of those behind it. Then a tensor travels while its receiver does something else, and
nobody waits for a tensor behind one that nobody has made room for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stowplan.core.schedule import Schedule
from stowplan.planner.schedule.coding import B, F, I, encode

__all__ = ["Channel", "channels"]

Integers = npt.NDArray[np.int64]

_AHEAD = 1  # actions between a buffer's allocation and its use, so that what is sent meanwhile has arrived


@dataclass(frozen=True, eq=False)
class Channel:
    """What ``source`` sends to ``target``, in order: int64 [tensor].

    Attributes:
        stages: the stage that uses the tensor.
        gradients: 1 where it is the gradient of that stage's output, 0 where it is its input.
        microbatches: of the tensor.
        sent: the position among the actions of ``source`` of the one that makes it.
        used: the position among those of ``target`` of the one that needs it.
        posted: the position among those of ``target`` before which its buffer is there.
    """

    source: int
    target: int
    stages: Integers
    gradients: Integers
    microbatches: Integers
    sent: Integers
    used: Integers
    posted: Integers


def channels(schedule: Schedule) -> list[Channel]:
    """The channels of ``schedule``, which ``check`` has passed or has forward passes alone, by source and target."""
    m, num_stages = schedule.num_microbatches, schedule.num_stages
    place = np.zeros((4, num_stages, m), dtype=np.int64)
    flat = place.reshape(-1)
    for codes in encode(schedule):
        flat[np.array(codes, dtype=np.int64)] = np.arange(len(codes))
    backward = np.maximum(place[I], place[B])  # one of them is there, the other one 0
    every = np.arange(m)
    parts: dict[tuple[int, int], list[tuple[Integers, ...]]] = {}
    for stage in range(1, num_stages):
        low, high = schedule.stage_devices[stage - 1], schedule.stage_devices[stage]
        if low == high:
            continue
        forth = (np.full(m, stage), np.zeros_like(every), every, place[F, stage - 1], place[F, stage])
        back = (np.full(m, stage - 1), np.ones_like(every), every, backward[stage], backward[stage - 1])
        parts.setdefault((low, high), []).append(forth)
        if backward.any():
            parts.setdefault((high, low), []).append(back)
    return [
        _channel(source, target, *map(np.concatenate, zip(*part, strict=True)))
        for (source, target), part in sorted(parts.items())
    ]


def _channel(
    source: int,
    target: int,
    stages: Integers,
    gradients: Integers,
    microbatches: Integers,
    sent: Integers,
    used: Integers,
) -> Channel:
    """Tensors in the order in which they are sent."""
    order = np.argsort(sent, kind="stable")
    first_needed = np.minimum.accumulate(used[order][::-1])[::-1]
    posted = np.maximum(first_needed - _AHEAD, 0)
    return Channel(
        source, target, stages[order], gradients[order], microbatches[order], sent[order], used[order], posted
    )
