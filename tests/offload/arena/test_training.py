"""Real training through the arena on the CPU: exact, served at planned addresses, within the planned height."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import stowplan
from stowplan.arena import Stats
from stowplan.offload.memory_log import memory_log
from tests import models

MODELS: dict[str, Callable[[], torch.nn.Module]] = {"llama": models.llama, "gpt2": models.gpt2}
CPU = torch.device("cpu")


@pytest.fixture
def arena() -> Iterator[Any]:
    stowplan.arena.install("cpu", strict=True)
    yield stowplan.arena
    stowplan.arena.uninstall()
    gc.collect()


class Steps:
    """A training loop that keeps what each step added to the arena's counters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.seen: list[torch.Tensor] = []
        self.counted: list[dict[str, int]] = []
        self.disturb: Callable[[int], object] = lambda step: None
        torch.manual_seed(7)

    def run(self, num_steps: int, zero_first: bool = False, lengths: tuple[int, ...] = (32,)) -> Steps:
        for _ in range(num_steps):
            step = len(self.seen)
            before = _counters()
            if zero_first:
                self.optimizer.zero_grad()
            batch = models.batch_for(step, sequence=lengths[step % len(lengths)])
            loss = self.model(**batch).loss
            self.disturb(step)
            loss.backward()
            self.optimizer.step()
            if not zero_first:
                self.optimizer.zero_grad()
            self.seen.append(loss.detach().clone())
            after = _counters()
            self.counted.append({name: after[name] - before[name] for name in after})
        return self

    def result(self) -> list[torch.Tensor]:
        return [*self.seen, *(parameter.detach().clone() for parameter in self.model.parameters())]

    def share(self, step: int) -> float:
        """Of what is planned, how much was served at its address."""
        counted = self.counted[step]
        return counted["hits"] / (counted["hits"] + counted["misses"])


_COUNTERS = ("hits", "misses", "unplanned", "strangers", "overlaps", "resynchronisations", "requests")


def _counters() -> dict[str, int]:
    try:
        stats = stowplan.arena.stats()
    except stowplan.ArenaUnavailable:
        return dict.fromkeys(_COUNTERS, 0)
    return {name: getattr(stats, name) for name in _COUNTERS}


def without_arena(model: torch.nn.Module, *arguments: Any, **options: Any) -> list[torch.Tensor]:
    stowplan.arena.uninstall()
    expected = Steps(model).run(*arguments, **options).result()
    stowplan.arena.install("cpu", strict=True)
    return expected


def equal(seen: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("zero_first", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_training_is_exact_and_served_from_the_plan(arena: Any, name: str, zero_first: bool) -> None:
    expected = without_arena(MODELS[name](), 8, zero_first=zero_first)
    steps = Steps(MODELS[name]()).run(8, zero_first=zero_first)
    assert equal(steps.result(), expected)
    stats = arena.stats()
    assert stats.plans == 1
    assert all(steps.share(step) >= 0.99 for step in range(4, 8))
    assert steps.counted[-1]["strangers"] == 0
    assert steps.counted[-1]["hits"] == stats.planned_requests > 100
    assert stats.peak_bytes == stats.height_bytes
    assert stats.slack_bytes == 0


def test_gradients_that_live_into_the_next_step_have_addresses(arena: Any) -> None:
    model = models.llama()
    steps = Steps(model).run(8, zero_first=True)
    inside = [_in_slab(parameter.grad) for parameter in model.parameters() if parameter.grad.nbytes >= 1024]
    assert all(inside)
    assert inside
    assert steps.counted[-1]["overlaps"] == 0


def _in_slab(tensor: torch.Tensor) -> bool:
    """A block at a planned address counts as planned while it is alive."""
    before = stowplan.arena.stats()
    size = tensor.untyped_storage().nbytes()
    tensor.untyped_storage().resize_(0)
    after = stowplan.arena.stats()
    return before.planned_bytes - after.planned_bytes == size


def test_batches_of_several_lengths_have_a_plan_each(arena: Any) -> None:
    lengths = (32, 16, 24)
    expected = without_arena(models.gpt2(), 14, lengths=lengths)
    steps = Steps(models.gpt2()).run(14, lengths=lengths)
    assert equal(steps.result(), expected)
    assert arena.stats().plans == 3
    assert all(steps.share(step) >= 0.99 for step in range(9, 14))


@pytest.mark.parametrize("policy", ["swap", "mixed"])
def test_under_an_activation_plan(arena: Any, policy: str) -> None:
    from stowplan.offload.blocks import Block
    from stowplan.offload.copies import PlainCopies
    from stowplan.offload.engine import Engine
    from stowplan.offload.host_slab import HostSlab
    from tests.offload import toys

    expected = without_arena(models.gpt2(), 9)
    model = models.gpt2()
    names = toys.block_names(model)
    decisions = toys.decide(model, names, policy, lambda twin: twin(**models.batch_for(0, sequence=32)))
    blocks = [Block(name, model.get_submodule(name)) for name in names]
    Engine(model, blocks, decisions, PlainCopies(HostSlab(2**24)))
    steps = Steps(model).run(9)
    assert equal(steps.result(), expected)
    assert all(steps.share(step) >= 0.99 for step in range(6, 9))
    assert arena.stats().peak_bytes == arena.stats().height_bytes


def test_a_plan_is_made_and_applied(arena: Any) -> None:
    expected = without_arena(models.llama(), 8)
    model = models.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = models.batch_for(0, sequence=32)
    free = stowplan.plan(model, batch, optimizer=optimizer)
    plan = stowplan.replan(free, budget=int(free.prediction.peak_bytes * 0.9))
    with stowplan.apply(plan, model):
        steps = Steps(model).run(8)
    assert equal(steps.result(), expected)
    assert steps.share(-1) >= 0.99


def test_one_stray_request_costs_one_miss_and_the_next_step_none(arena: Any) -> None:
    steps = Steps(models.llama())
    steps.disturb = lambda step: torch.empty(12345) if step == 6 else None
    steps.run(9)
    assert [steps.counted[step]["misses"] for step in (5, 6, 7, 8)] == [0, 1, 0, 0]
    assert steps.counted[6]["hits"] == steps.counted[5]["hits"]


def test_an_extra_block_of_a_common_size_costs_few_misses(arena: Any) -> None:
    steps = Steps(models.llama())
    kept = []

    def keep_an_activation(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(steps.seen) in {6, 7}:
            kept.append(torch.ones_like(arguments[0]))

    hook = steps.model.model.layers[1].mlp.register_forward_pre_hook(keep_an_activation)
    steps.run(8)
    hook.remove()
    steps.run(2)
    assert steps.counted[5]["misses"] == 0
    assert all(0 < steps.counted[step]["misses"] <= 0.05 * steps.counted[step]["hits"] for step in (6, 7))
    assert steps.counted[9]["misses"] <= 2  # what is kept from those steps may still be in the way
    assert all(torch.equal(block, torch.ones_like(block)) for block in kept)


def test_evaluation_between_steps_costs_no_plan(arena: Any) -> None:
    steps = Steps(models.gpt2()).run(6)
    with torch.no_grad():
        steps.model(**models.batch_for(0, batch=3, sequence=20))
    steps.run(3)
    assert steps.counted[-1]["misses"] == 0
    assert stowplan.arena.stats().plans == 1


def test_a_hundred_steps_leave_nothing_behind(arena: Any) -> None:
    steps = Steps(models.llama(2, 16)).run(10)
    gc.collect()
    before = arena.stats()
    steps.run(100)
    gc.collect()
    after = arena.stats()
    kept = sum(loss.nbytes for loss in steps.seen[10:])
    assert after.planned_bytes == before.planned_bytes
    assert after.fallback_bytes - before.fallback_bytes <= kept
    assert (after.slab_bytes, after.plans) == (before.slab_bytes, before.plans)
    assert after.fallback_peak_bytes - before.fallback_peak_bytes <= kept


def test_torchs_profiler_sees_the_same_bytes(arena: Any) -> None:
    def peaks() -> list[int]:
        steps = Steps(models.llama()).run(6)
        gc.collect()
        with memory_log(CPU) as log:
            steps.run(1)
        return [log.segments[0].peak_bytes, log.segments[0].end_bytes]

    served = peaks()
    assert arena.stats().hits > 0
    stowplan.arena.uninstall()
    plain = peaks()
    stowplan.arena.install("cpu", strict=True)
    assert served == plain


def test_tensors_outlive_the_arena_and_precede_it() -> None:
    early = torch.full((5000,), 3.0)
    stowplan.arena.install("cpu", strict=True)
    steps = Steps(models.llama()).run(6)
    assert stowplan.arena.stats().hits > 0
    late = [torch.full((5000,), float(number)) for number in range(8)]
    stowplan.arena.uninstall()
    assert torch.equal(early, torch.full((5000,), 3.0))
    del early
    for number, tensor in enumerate(late):
        assert torch.equal(tensor, torch.full((5000,), float(number)))
    del late, steps
    gc.collect()
    stowplan.arena.install("cpu", strict=True)
    stats = stowplan.arena.stats()
    stowplan.arena.uninstall()
    assert stats.planned_bytes == 0
    assert stats.unknown_frees == stats.double_frees == 0


def test_out_of_memory_is_torchs_own_error(arena: Any) -> None:
    with pytest.raises(RuntimeError, match=r"not enough memory|can't allocate memory"):
        torch.empty(2**58, dtype=torch.uint8)
    assert arena.stats().out_of_memory == 1
    assert torch.empty(0).nbytes == 0


def test_micro_batches_are_one_step(arena: Any) -> None:
    model = models.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(7):
        for micro in range(3):
            (model(**models.batch_for(3 * step + micro)).loss / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 5:
            before = arena.stats()
    after = arena.stats()
    assert after.steps == 7
    assert after.plans == 1
    assert after.misses == before.misses


def test_steps_may_be_marked_by_hand(arena: Any) -> None:
    model = models.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(6):
        model(**models.batch_for(0)).loss.backward()
        optimizer.zero_grad()
        arena.step()
    assert arena.stats().steps == 6
    assert arena.stats().plans == 1
    model(**models.batch_for(0)).loss.backward()
    optimizer.step()
    assert arena.stats().steps == 6


def test_counters_begin_anew(arena: Any) -> None:
    Steps(models.llama()).run(5)
    stowplan.arena.uninstall()
    stowplan.arena.install("cpu", strict=True)
    stats = arena.stats()
    assert isinstance(stats, Stats)
    assert (stats.hits, stats.steps, stats.plans, stats.slab_bytes) == (0, 0, 0, 0)
