"""Whatever schedule can be run is run, bit for bit, and leaves nothing behind."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from stowplan.core.schedule import Action, Kind, Schedule, loop_placement, v_placement
from stowplan.planner.schedule import check, generate
from stowplan.planner.schedule.messages import channels
from stowplan.runtime.pipeline.deferred import WeightGradients
from stowplan.runtime.pipeline.executor import Executor
from stowplan.runtime.pipeline.transfers import Form, Link, Transfers
from tests.distributed import Ranks

pytestmark = pytest.mark.slow  # processes of their own

F, I, W, B = Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.BACKWARD  # noqa: E741
WIDTH, ROWS = 8, 4


def random_schedule(seed: int, placement: Sequence[int], num_microbatches: int, in_order: bool) -> Schedule:
    """Any order that can be run: passes are drawn among those that what is done already allows.

    ``in_order``: a stage does its microbatches' gradients one after the other, as one process would add them up.
    """
    draw = random.Random(seed)
    last = len(placement) - 1
    split = {(s, m): draw.random() < 0.7 for s in range(last + 1) for m in range(num_microbatches)}
    left = {Action(s, F, m) for s, m in split}
    for (stage, microbatch), apart in split.items():
        left |= {Action(stage, kind, microbatch) for kind in ((I, W) if apart else (B,))}
    done: set[Action] = set()
    orders: list[list[Action]] = [[] for _ in range(max(placement) + 1)]

    def backward(stage: int, microbatch: int) -> Action:
        return Action(stage, I if split[stage, microbatch] else B, microbatch)

    def can_run(action: Action) -> bool:
        stage, kind, microbatch = action
        if kind is F:
            return not stage or Action(stage - 1, F, microbatch) in done
        if in_order and microbatch:
            before = backward(stage, microbatch - 1)
            if before not in done or (kind in (W, B) and before._replace(kind=W) in left):
                return False
        if kind is W:
            return Action(stage, I, microbatch) in done
        return Action(stage, F, microbatch) in done and (stage == last or backward(stage + 1, microbatch) in done)

    weights = {kind: draw.random() ** 2 + 0.01 for kind in Kind}  # some hurry on, others put off
    while left:
        ready = sorted(filter(can_run, left))
        action = draw.choices(ready, [weights[action.kind] for action in ready])[0]
        left.remove(action)
        done.add(action)
        orders[placement[action.stage]].append(action)
    schedule = Schedule(tuple(map(tuple, orders)), tuple(placement), num_microbatches)
    check(schedule)
    return schedule


class Layers(torch.nn.Module):
    """A stage of two linear layers; the last one gives a loss."""

    def __init__(self, number: int, is_last: bool) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.first, self.second = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH)
        self.is_last = is_last

    def forward(self, hidden: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
        out = self.second(self.first(inputs if hidden is None else hidden).tanh())
        return out.square().mean() if self.is_last else out


def inputs_of(num_microbatches: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(num_microbatches)]


def gradients_of_one_process(num_stages: int, num_microbatches: int) -> list[list[torch.Tensor]]:
    stages = [Layers(number, number == num_stages - 1) for number in range(num_stages)]
    for inputs in inputs_of(num_microbatches):
        hidden = None
        for stage in stages:
            hidden = stage(hidden, inputs)
        assert hidden is not None
        hidden.backward()
    return [[p.grad for p in stage.parameters() if p.grad is not None] for stage in stages]


class Running:
    """An executor of Layers on this process."""

    def __init__(self, schedule: Schedule, link: Link) -> None:
        last = schedule.num_stages - 1
        self.forms = [None, *[Form((ROWS, WIDTH), torch.float32)] * last]
        self.stages = {number: Layers(number, number == last) for number in schedule.stages_of(link.rank)}
        self.deferred = {number: WeightGradients() for number in self.stages}
        for number, deferred in self.deferred.items():
            deferred.install(self.stages[number])
        collects = {number: deferred.collect for number, deferred in self.deferred.items()}
        self.executor = Executor(schedule, Transfers(schedule, link), self.stages, collects)
        self.inputs = inputs_of(schedule.num_microbatches)

    def step(self) -> list[torch.Tensor]:
        return self.executor.step(self.forms, self.inputs, torch.ones(()))


def run_all(rank: int, schedules: Sequence[tuple[Schedule, bool]]) -> None:
    link = Link(None, torch.device("cpu"))
    for schedule, in_order in schedules:
        running = Running(schedule, link)
        running.step()
        truth = gradients_of_one_process(schedule.num_stages, schedule.num_microbatches)
        for number, stage in running.stages.items():
            for parameter, expected in zip(stage.parameters(), truth[number], strict=True):
                if in_order:
                    assert torch.equal(parameter.grad, expected), f"stage {number}\n{schedule}"
                else:  # sums are in another order
                    torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)


def random_schedules(size: int, count: int) -> list[tuple[Schedule, bool]]:
    made = []
    for seed in range(count):
        placement = (v_placement(size), loop_placement(size), loop_placement(size, 2))[seed % 3 if seed % 2 else 0]
        made.append((random_schedule(seed, placement, 1 + seed % 7, seed % 4 != 3), seed % 4 != 3))
    return made


@pytest.mark.parametrize(
    ("size", "count"), [(2, 30), (4, 12), pytest.param(2, 400, marks=pytest.mark.full), *(
        pytest.param(size, 250, marks=pytest.mark.full) for size in (4, 8)
    )],
)  # fmt: skip
def test_random_schedules(request: pytest.FixtureRequest, size: int, count: int) -> None:
    ranks: Ranks = request.getfixturevalue({2: "ranks", 4: "ranks4", 8: "ranks8"}[size])
    made = random_schedules(size, count)
    kinds = Counter(action.kind for schedule, _ in made for order in schedule.orders for action in order)
    assert min(kinds[kind] for kind in Kind) > count
    assert len({schedule.stage_devices for schedule, _ in made}) == 3
    ranks.run(run_all, made)


# ---- buffers ---------------------------------------------------------------------------------------------------------


class Counting(Transfers):
    """Counts the buffers that are there and not used yet."""

    most = 0

    def post(self, position: int) -> None:
        super().post(position)
        self.most = max(self.most, len(self._coming))


def most_buffers(schedule: Schedule, device: int) -> int:
    """What ``channels`` says: buffers are there from before the action at ``posted`` until ``used`` begins."""
    there: list[int] = []
    for position in range(len(schedule.orders[device])):
        count = 0
        for channel in channels(schedule):
            if channel.target == device:
                count += int(((channel.posted <= position) & (channel.used >= position)).sum())
        there.append(count)
    return max(there)


def buffers(rank: int, schedules: Sequence[Schedule]) -> list[tuple[int, int]]:
    link = Link(None, torch.device("cpu"))
    found = []
    for schedule in schedules:
        running = Running(schedule, link)
        counting = running.executor.transfers = Counting(schedule, link)
        running.step()
        assert not counting._coming
        assert not counting._here
        assert not counting._going
        found.append((counting.most, most_buffers(schedule, rank)))
    return found


def test_there_are_no_more_buffers_than_planned(ranks4: Ranks) -> None:
    made = [generate(name, 4, 12) for name in ("1f1b", "v-min", "v-half", "v-zb", "interleaved", "gpipe")]
    made += [schedule for schedule, _ in random_schedules(4, 6)]
    for answers in ranks4.run(buffers, made):
        for (most, planned), schedule in zip(answers, made, strict=True):
            assert 0 < most <= planned
            assert most < schedule.num_microbatches * schedule.num_stages or schedule.num_microbatches < 3


# ---- what is left behind ---------------------------------------------------------------------------------------------


@contextmanager
def every_tensor_seen(seen: list[weakref.ref[torch.Tensor]]) -> Any:
    """Outputs of all functions, as long as they live."""

    class Seeing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.extend(weakref.ref(leaf) for leaf in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(leaf))
            return out

    with Seeing():
        yield


def nothing_stays(rank: int, schedule: Schedule) -> None:
    running = Running(schedule, Link(None, torch.device("cpu")))
    running.step()  # gradients are there from now on
    seen: list[weakref.ref[torch.Tensor]] = []
    gc.disable()  # nothing waits for the collector
    try:
        with every_tensor_seen(seen):
            losses = running.step()
        alive = [tensor for ref in seen if (tensor := ref()) is not None]
        gradients = {p.grad.data_ptr() for stage in running.stages.values() for p in stage.parameters()}
        losses_at = {loss.data_ptr() for loss in losses}
        left = [tensor.shape for tensor in alive if tensor.data_ptr() not in gradients | losses_at]
    finally:
        gc.enable()
    assert len(seen) > 10 * schedule.num_microbatches
    assert left == []


@pytest.mark.parametrize("name", ["v-half", "1f1b", "interleaved"])
def test_no_tensor_outlives_its_step(ranks: Ranks, name: str) -> None:
    ranks.run(nothing_stays, generate(name, 2, 6))


def sends(rank: int, schedule: Schedule) -> int:
    """The most that are on their way at a time."""
    most = 0

    class Watching(Transfers):
        def post(self, position: int) -> None:
            nonlocal most
            super().post(position)
            most = max(most, len(self._going))

    link = Link(None, torch.device("cpu"))
    running = Running(schedule, link)
    running.executor.transfers = Watching(schedule, link)
    running.step()
    return most


def test_sends_are_let_go_on_the_way(ranks: Ranks) -> None:
    """A device cannot be further ahead of the next one than the schedule lets it be."""
    schedule = generate("1f1b", 2, 64)
    assert max(ranks.run(sends, schedule)) < 16


def threads(rank: int, schedule: Schedule) -> tuple[int, int]:
    link = Link(None, torch.device("cpu"))

    def count() -> int:
        return sum(thread.name == "stowplan-sends" for thread in threading.enumerate())

    gc.collect()
    before = count()
    most = 0
    for _ in range(4):
        running = Running(schedule, link)
        running.step()
        running.step()
        most = max(most, count() - before)
        ended = [t for t in threading.enumerate() if t.name == "stowplan-sends"][before:]
        del running
        gc.collect()
        for thread in ended:
            thread.join(timeout=120)
    return most, count() - before


def test_threads_end_with_their_executor(ranks: Ranks) -> None:
    for most, left in ranks.run(threads, generate("v-half", 2, 4)):
        assert 1 <= most <= 2
        assert left == 0
