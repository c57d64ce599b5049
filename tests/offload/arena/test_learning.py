"""Which steps are planned: those that come back, or the latest after a while; what becomes of plans."""

from __future__ import annotations

from typing import NoReturn

import pytest

import stowplan
from stowplan.arena import Stats, _packed
from stowplan.offload.arena.learning import Learner
from tests.offload.arena.device import MIB, Device


class Steps:
    """Steps that allocate sizes in order and free them in the same order, ``alive`` of them at a time."""

    def __init__(self, most_plans: int = 8, limit_bytes: int = 2**40) -> None:
        self.device = Device(limit_bytes)
        self.arena = self.device.arena
        self.learner = Learner(self.arena, _packed, 512, most_plans)

    def run(self, *sizes: int, alive: int = 2) -> tuple[int, int]:
        """Hits and misses of one step."""
        before = self.arena.stats()
        waiting: list[int] = []
        for size in sizes:
            waiting.append(self.device.allocate(size) or 0)
            if len(waiting) >= alive:
                self.device.free(waiting.pop(0))
        for pointer in waiting:
            self.device.free(pointer)
        self.learner.step()
        after = self.arena.stats()
        return after.hits - before.hits, after.misses - before.misses


@pytest.fixture
def steps() -> Steps:
    return Steps()


def test_a_sequence_is_planned_when_it_comes_back(steps: Steps) -> None:
    sizes = [1024, 2048, 4096] * 4
    assert [steps.run(*sizes) for _ in range(4)] == [(0, 0), (0, 0), (12, 0), (12, 0)]


def test_sequences_come_back_in_any_order(steps: Steps) -> None:
    short, long = [1024, 2048] * 6, [4096, 8192] * 6
    served = [steps.run(*sizes) for sizes in (short, long, short, long, long, short, long)]
    assert [hits for hits, _ in served[-3:]] == [12, 12, 12]
    assert len(steps.learner.plans) == 2
    assert steps.arena.stats().slab_bytes == max(plan.height_bytes for plan in steps.learner.plans.values())


def test_plans_with_the_same_beginning_are_told_apart_later(steps: Steps) -> None:
    one, other = [1024] * 8 + [2048] * 8, [1024] * 8 + [4096] * 8
    for _ in range(3):
        for sizes in (one, other):
            steps.run(*sizes)
    for sizes in (one, other, one):  # a block from before the plan was chosen may be in the way
        hits, misses = steps.run(*sizes)
        assert hits + misses == 16
        assert misses <= 1


def test_a_sequence_that_never_comes_back_is_planned_in_the_end(steps: Steps) -> None:
    common = [1024, 2048, 4096, 8192] * 60
    for stray in range(4):
        steps.run(3000 + stray, *common)
    hits, misses = steps.run(3999, *common)
    assert hits >= len(common) - 2  # the place is found again by three in a row
    assert hits + misses == len(common) + 1


def test_steps_that_change_for_good_are_planned_anew(steps: Steps) -> None:
    for _ in range(3):
        steps.run(*[1024, 2048] * 6)
    for _ in range(2):
        steps.run(*[4096, 8192, 512] * 6)
    assert steps.run(*[4096, 8192, 512] * 6) == (18, 0)


def test_blocks_that_live_longer_revise_the_plan(steps: Steps) -> None:
    sizes = [1024] * 12
    for _ in range(3):
        steps.run(*sizes)
    _, misses = steps.run(*sizes, alive=6)
    assert misses > 0
    steps.run(*sizes, alive=6)
    assert steps.run(*sizes, alive=6) == (12, 0)
    assert steps.arena.stats().overlaps > 0


def test_the_plan_that_was_not_used_for_longest_goes() -> None:
    steps = Steps(most_plans=2)
    kinds = [[size] * 10 for size in (1024, 2048, 4096)]
    for sizes in (kinds[0], kinds[1]) * 2:
        steps.run(*sizes)
    steps.run(*kinds[0])
    for _ in range(2):
        steps.run(*kinds[2])
    assert len(steps.learner.plans) == 2
    assert steps.run(*kinds[0]) == (10, 0)
    assert steps.run(*kinds[2]) == (10, 0)
    assert steps.run(*kinds[1])[0] == 0


def test_no_room_for_a_slab_is_told_once() -> None:
    steps = Steps(limit_bytes=25 * MIB)
    held = steps.device.allocate(4 * MIB)  # a part of a segment of 20 MiB, which serves the steps, too
    assert held is not None
    steps.learner.step()
    steps.run(14 * MIB)
    with pytest.warns(UserWarning, match=r"no room for a slab of 14\.00 MiB .* Install with slab="):
        steps.run(14 * MIB)
    assert [steps.run(14 * MIB) for _ in range(5)] == [(0, 0)] * 5
    steps.device.free(held)


@pytest.mark.parametrize("error", [MemoryError("none left"), stowplan.PlanRejected("wrong addresses")])
def test_planning_that_fails_does_not_end_training(steps: Steps, error: Exception) -> None:
    def fail(*arguments: object) -> NoReturn:
        raise error

    steps.learner = Learner(steps.arena, fail, 512, 8)
    sizes = [1024, 2048, 4096] * 4
    steps.run(*sizes)
    with pytest.warns(UserWarning, match=f"could not plan a step, and serves it without a plan: {error}"):
        steps.run(*sizes)
    steps.learner._pack = _packed
    assert [steps.run(*sizes) for _ in range(4)] == [(0, 0), (0, 0), (12, 0), (12, 0)]


def test_a_slab_that_was_given_back_is_taken_again() -> None:
    steps = Steps(limit_bytes=100 * MIB)
    sizes = [20 * MIB] * 4
    for _ in range(3):
        steps.run(*sizes)
    assert steps.run(*sizes) == (4, 0)
    evaluation = steps.device.allocate(90 * MIB)
    assert evaluation
    counted = steps.arena.stats()
    assert (counted.slab_bytes, counted.peak_bytes > 0) == (0, True)
    assert Stats(slab_bytes=counted.slab_bytes, peak_bytes=counted.peak_bytes).slack_bytes == 0
    steps.device.free(evaluation)
    steps.run(*sizes)
    assert steps.run(*sizes) == (4, 0)
