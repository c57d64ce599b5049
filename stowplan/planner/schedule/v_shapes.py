"""Schedules of two stages a device in the shape of a V: V-Min, V-Half, V-ZB.

From "Pipeline Parallelism with Controllable Memory" (arXiv 2405.15362), sections 3 and 4. Device i of p holds stages i
and 2p−1−i. A *block* says when the passes of one microbatch begin, in ticks of one pass each; it is repeated every six
ticks, the work of a microbatch on a device. Weight gradients go, oldest first, into ticks that stay free. Then passes
of the warm-up (up to a device's first input gradient of its first stage) and of the cool-down (after its last forward
pass of that stage) are pulled to the earliest tick that dependencies and the peak of the repeated block allow. In the
cool-down a weight gradient gives way to every other pass: others wait for those, and it fills what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from stowplan.core.errors import InvalidArgument
from stowplan.core.schedule import Schedule, v_placement
from stowplan.planner.schedule.coding import F, I, W, decode

__all__ = ["BLOCKS", "PERIOD", "Ticks", "two_speed_block", "v_half_block", "v_min_block", "v_schedule", "v_zb_block"]

Integers = npt.NDArray[np.int64]

# Columns of tables [device, pass]: the first and the second stage of a device, forward, input and weight gradient.
F0, F1, I0, I1, W0, W1 = range(6)
PERIOD = 6  # ticks
_NEVER = np.iinfo(np.int64).max // 2
_LATE = _NEVER // 2  # after all that is not


@dataclass(frozen=True, eq=False)
class Ticks:
    """A block: when the first microbatch's F0, F1, I0 and I1 begin, int64 [device, 4]; each next one's a period later.

    A ``period`` longer than ``PERIOD``, the work of a microbatch, leaves devices idle and fewer activations in memory.
    """

    begins: Integers
    period: int = PERIOD

    @property
    def num_devices(self) -> int:
        return len(self.begins)

    @property
    def life_microbatches(self) -> float:
        """What repeating takes: the ticks that activations live on a device (W right after I), in whole periods."""
        first, second, last, before = self.begins.T
        return float((last - first + before - second + 4).max() / (2 * self.period))


def _block(num_devices: int, f0: Integers, f1: Integers, i0: Integers, i1: Integers) -> Ticks:
    return Ticks(np.stack([f0, f1, i0, i1], axis=1).reshape(num_devices, 4))


def v_min_block(num_devices: int) -> Ticks:
    """Least memory: about a third of 1F1B's."""
    p, i = num_devices, np.arange(num_devices)
    shift = 2 if p % 3 == 0 else 0
    return _block(p, i, 2 * p - 1 - i, 4 * p + shift - 1 - i, 2 * p + shift + i)


def v_half_block(num_devices: int) -> Ticks:
    """About half of 1F1B's memory."""
    p, i = num_devices, np.arange(num_devices)
    shift = 3 if p % 2 == 0 else 0
    return _block(p, 2 * i, 3 * p - 2 - i, 6 * p + shift - 2 - i, 3 * p + shift - 1 + 2 * i)


def v_zb_block(num_devices: int) -> Ticks:
    """No bubble but that of the first forward passes, with 1F1B's memory."""
    p, i = num_devices, np.arange(num_devices)
    back = 2 * (p - 1 - i)
    return _block(p, 4 * i, 4 * p - 3 + back, 10 * p - 7 + back, 6 * p - 4 + 4 * i)


BLOCKS = {"v-min": v_min_block, "v-half": v_half_block, "v-zb": v_zb_block}


def v_schedule(block: Ticks, num_microbatches: int, *, most_activations: int = 0) -> Schedule:
    """``block`` repeated, filled, and pulled together at its ends.

    That may take ``most_activations`` on a device, if this is more than what the repeated block takes.
    """
    begins = _repeat_and_fill(block, num_microbatches)
    passes = _pull(begins, num_microbatches, max(most_activations, int(_peaks(begins).max())))
    if passes is None:
        passes = [np.argsort(row.ravel(), kind="stable") // num_microbatches for row in begins]
    return _as_schedule(passes, num_microbatches)


def _repeat_and_fill(block: Ticks, num_microbatches: int) -> Integers:
    """When each pass begins, int64 [device, pass, microbatch]; weight gradients in the order of input gradients."""
    p = block.num_devices
    begins = np.empty((p, 6, num_microbatches), dtype=np.int64)
    begins[:, :W0] = block.begins[:, :, None] + block.period * np.arange(num_microbatches)
    for device in range(p):
        taken = begins[device, :W0].ravel()
        if len(np.unique(taken)) != len(taken):
            raise InvalidArgument(f"in this block two passes of device {device} begin at the same tick.")
        ready = begins[device, I0:W0].ravel()
        order = np.argsort(ready)
        first, last = int(taken.min()), int(taken.max())
        free = np.ones(last - first + 1 + len(ready), dtype=np.bool_)
        free[taken - first] = False
        free_ticks = np.flatnonzero(free) + first
        count = np.arange(len(ready))
        earliest = np.searchsorted(free_ticks, ready[order], side="right")
        begins[device, W0:].reshape(-1)[order] = free_ticks[np.maximum.accumulate(earliest - count) + count]
    return begins


def _pull(begins: Integers, num_microbatches: int, most_activations: int) -> list[Integers] | None:
    """The passes of each device in their final order, or None where the pulled passes get in each other's way.

    All devices go through the ticks in step. A type of pass takes its microbatches in turn, so how many of each type
    are done (``done``) is all there is to know.
    """
    p, m = len(begins), num_microbatches
    last_forward = begins[:, F0, -1]
    warm_up = np.minimum(begins[:, I0, 0], last_forward)
    gives_way = np.array([0, 0, 0, 0, 1, 1]) * _LATE
    needs = _needs(p)
    table = np.concatenate([begins, np.full((p, 6, 1), _NEVER)], axis=2).reshape(-1)
    rows = np.arange(6 * p).reshape(p, 6) * (m + 1)
    done = np.zeros((p, 6), dtype=np.int64)
    with_start = np.full(6 * p + 1, m + 1)  # the last entry: what needs nothing
    devices = np.arange(p)
    ran: list[Integers] = []
    left = 6 * m * p
    while left:
        begin = table[rows + done]
        soonest = begin.min(axis=1)
        with_start[:-1] = done.reshape(-1)
        ready = with_start[needs] > done
        held = done[:, F0] + done[:, F1] - done[:, W0] - done[:, W1]
        steady = (soonest > warm_up) & (soonest <= last_forward)
        ready[:, :I0] &= ((held < most_activations) | steady)[:, None]
        limit = np.where(soonest <= warm_up, warm_up, np.where(steady, soonest, _NEVER - 1))
        rank = begin + np.where((soonest > last_forward)[:, None], gives_way, 0)
        choice = np.where(ready & (begin <= limit[:, None]), rank, _NEVER)
        chosen = choice.argmin(axis=1)
        runs = choice[devices, chosen] < _NEVER
        num_run = int(runs.sum())
        if not num_run:
            return None
        left -= num_run
        done[devices[runs], chosen[runs]] += 1
        ran.append(np.where(runs, chosen, -1))
    history = np.stack(ran, axis=1)
    return [row[row >= 0] for row in history]


def _needs(p: int) -> Integers:
    """For each pass the pass that must be done before, as an index into [device, pass] of all devices, or the end."""
    nothing = 6 * p
    needs = np.empty((p, 6), dtype=np.int64)
    for i in range(p):
        needs[i, F0] = 6 * (i - 1) + F0 if i else nothing
        needs[i, F1] = 6 * (i + 1) + F1 if i < p - 1 else 6 * i + F0
        needs[i, I1] = 6 * (i - 1) + I1 if i else F1
        needs[i, I0] = 6 * (i + 1) + I0 if i < p - 1 else 6 * i + I1
        needs[i, W0], needs[i, W1] = 6 * i + I0, 6 * i + I1
    return needs


def _peaks(begins: Integers) -> Integers:
    """Activations that each device holds at most, [device]; a pass takes one tick."""
    p = len(begins)
    peaks = np.empty(p, dtype=np.int64)
    for device in range(p):
        times = np.concatenate([begins[device, F0 : F1 + 1].ravel(), begins[device, W0:].ravel() + 1])
        changes = np.repeat([1, -1], len(times) // 2)
        peaks[device] = np.cumsum(changes[np.lexsort((changes, times))]).max()
    return peaks


def _as_schedule(passes: list[Integers], num_microbatches: int) -> Schedule:
    p = len(passes)
    orders = []
    for device, types in enumerate(passes):
        stages = (device, 2 * p - 1 - device) * 3
        kinds = (F, F, I, I, W, W)
        codes = np.empty(len(types), dtype=np.int64)
        for number in range(6):
            first = (kinds[number] * 2 * p + stages[number]) * num_microbatches
            codes[types == number] = first + np.arange(num_microbatches)
        orders.append(codes.tolist())
    return decode(orders, v_placement(p), num_microbatches)


def two_speed_block(
    num_devices: int, near: tuple[int, int], far: tuple[int, int], num_near: int, period: int = PERIOD
) -> Ticks | None:
    """A block whose passes take ``near`` ticks on each of the first ``num_near`` ways between devices, then ``far``.

    The first number of each is for F0 and I1, which go up, the second for F1 and I0, which come back (section 4.2 of
    the paper). At the turns passes wait as few ticks as let no two begin together; None where there is no such wait.
    """
    speeds = np.array([near if way < num_near else far for way in range(num_devices - 1)], dtype=np.int64)
    up = np.concatenate([[0], np.cumsum(speeds.reshape(-1, 2)[:, 0])])
    down = np.concatenate([np.cumsum(speeds.reshape(-1, 2)[::-1, 1])[::-1], [0]])
    f1 = up[-1] + down + _TURNS[:, :1]
    i1 = f1[:, :1] + up + _TURNS[:, 1:2]
    i0 = i1[:, -1:] + down + _TURNS[:, 2:]
    begins = np.stack([np.broadcast_to(up, f1.shape), f1, i0, i1], axis=2)
    phases = np.sort(begins % period, axis=2)
    apart = (np.diff(phases, axis=2) > 0).all(axis=(1, 2))
    return Ticks(begins[apart.argmax()], period) if apart.any() else None


_TURNS = np.array(sorted(product(range(1, PERIOD + 1), repeat=3), key=sum))
