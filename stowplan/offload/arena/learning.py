"""Which steps are planned, and when: at the end of a step that the plans at hand did not serve well.

A sequence of requests is planned when it comes for the second time, in a row or not: batches of varying length come
back in any order. What counts is the thread that trains; requests of other threads are planned with it if they come
back, too. Up to ``most_plans`` are kept, over one slab of the largest height; the arena chooses by the first
requests of a step. Where no sequence ever comes back (a stray request here and there), the latest one is planned after
a few steps, and again after twice as many: most of it will be found.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stowplan.core.errors import StowplanError
from stowplan.core.units import format_bytes
from stowplan.offload.arena.library import Arena, ArenaStep, Integers
from stowplan.offload.arena.lifetimes import FREE, Packer, StepLog, lay_out

__all__ = ["KeptPlan", "Learner"]

_MOST_EVENTS = 2**20  # of a step's log: 40 MiB
_MOST_SEQUENCES = 4096  # that are remembered by their hash
_MISSES = 0.01  # of a step's requests: above, it was not served well
_PATIENCE = 4  # steps without a plan, before the latest is planned
_MOST_REVISIONS = 3  # of one sequence's plan, where blocks live longer than they did


@dataclass(frozen=True, slots=True)
class KeptPlan:
    """A plan that the arena has: how many requests have an address, how high the addresses go."""

    num_requests: int
    height_bytes: int
    revision: int


class Learner:
    """Watches steps end, and gives the arena plans."""

    def __init__(
        self, arena: Arena, pack: Packer, alignment: int, most_plans: int, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.plans: OrderedDict[int, KeptPlan] = OrderedDict()  # by key, the last used last
        self.planning_seconds = 0.0
        self._arena = arena
        self._pack = pack
        self._alignment = alignment
        self._most_plans = most_plans
        self._now = now
        self._seen: Counter[int] = Counter()  # by hash of a lane's sizes
        self._num_dropped = 0
        self._num_events = 0, 0  # in the log of the last whole step, and of the one before
        self._departures = 0  # in a row
        self._patience = _PATIENCE
        self._refused_bytes: int | None = None  # there was no room for such a slab
        arena.record(_MOST_EVENTS)
        arena.serve(True)

    def step(self) -> None:
        """A training step has ended."""
        ended = self._arena.step()
        self._num_events = ended.num_events, self._num_events[0]
        if ended.plan in self.plans:
            self.plans.move_to_end(ended.plan)
            if _served_well(ended):
                self._departures = 0
                return
            if not ended.slab_bytes:  # given back, as memory ran out beside it
                self._reserve_again()
                return
        if not ended.num_events or ended.dropped_events:
            return
        start = self._now()
        try:
            self._depart(StepLog.of(self._arena.log(1, self._num_events[0])), ended.thread)
        except (MemoryError, StowplanError) as error:  # training goes on without a plan
            self._seen.clear()
            warnings.warn(f"the arena could not plan a step, and serves it without a plan: {error}", stacklevel=2)
        finally:
            self.planning_seconds += self._now() - start

    def _reserve_again(self) -> None:
        height = max(plan.height_bytes for plan in self.plans.values())
        if not self._arena.reserve(height):
            self._refuse(height)
            while self.plans:
                self._arena.drop_plan(self.plans.popitem()[0])

    def _depart(self, log: StepLog, thread: int) -> None:
        """A step of which no plan knew enough; ``thread`` is the one that trains, as it marked the end."""
        self._departures += 1
        lanes = log.lanes()
        if not lanes:  # blocks were freed, and none asked for
            return
        hashes = {lane: _hash(lane, log.sizes[requests]) for lane, requests in lanes.items()}
        known_lanes = [lane for lane in lanes if self._seen[hashes[lane]]]
        if len(self._seen) > _MOST_SEQUENCES:
            self._seen.clear()
        self._seen.update(hashes.values())
        leading = next((lane for lane in lanes if lane[0] == thread), next(iter(lanes)))
        key = hashes[leading]
        if key in self.plans:
            revision = self.plans[key].revision + 1
            if revision > _MOST_REVISIONS:
                return
        else:
            revision = 0
            # One more time for each round of plans that were thrown out, so that planning ends in a run where no
            # sequence comes back often.
            known = self._seen[key] >= 2 + self._num_dropped // self._most_plans
            if not known and self._departures < self._patience:
                return
            if not known:
                self._patience *= 2
        self._departures = 0
        planned = [lanes[lane] for lane in {leading, *known_lanes}]
        self._plan(key, log, np.sort(np.concatenate(planned)), revision)

    def _plan(self, key: int, log: StepLog, requests: Integers, revision: int) -> None:
        before = StepLog.of(self._arena.log(2, self._num_events[1]))
        layout = lay_out(log, before, self._alignment, self._pack)
        if self._refused_bytes is not None and layout.height_bytes >= self._refused_bytes:
            return
        if not self._arena.reserve(layout.height_bytes):
            self._refuse(layout.height_bytes)
            return
        while len(self.plans) >= self._most_plans and key not in self.plans:
            self._arena.drop_plan(self.plans.popitem(last=False)[0])
            self._num_dropped += 1
        self._arena.add_plan(
            key, log.threads[requests], log.streams[requests], log.sizes[requests], layout.offsets[requests]
        )
        self.plans[key] = KeptPlan(int((layout.offsets[requests] != FREE).sum()), layout.height_bytes, revision)

    def _refuse(self, num_bytes: int) -> None:
        self._refused_bytes = num_bytes
        warnings.warn(
            f"the arena has no room for a slab of {format_bytes(num_bytes)} beside what is allocated: such steps are "
            f"served without a plan. Install with slab= to reserve it at the start.",
            stacklevel=2,
        )


def _hash(lane: tuple[int, int], sizes: Integers) -> int:
    return hash((lane, sizes.tobytes())) & (2**62 - 1)


def _served_well(ended: ArenaStep) -> bool:
    followed = ended.requests - ended.strangers
    return bool(followed and ended.misses <= _MISSES * followed)
