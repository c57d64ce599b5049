"""A step's requests of memory, put together, beside those of a step that really runs."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import stowplan
from stowplan.core.allocations import AllocationTrace, Kind
from stowplan.core.errors import InvalidArgument, InvalidPlanFile
from stowplan.core.hardware import Hardware
from stowplan.core.plan import Plan
from stowplan.core.program import Action, Decisions, decision_by_rows, swaps
from stowplan.offload.allocation_log import allocation_log
from stowplan.planner.activations import Problem, simulate
from stowplan.planner.addresses import addresses_of, packing_problem, requests
from stowplan.planner.packing import validate
from stowplan.session import planning
from stowplan.session.heads import PlannedHead, replan_head
from stowplan.session.solving import Solver
from tests.models import batch_for, gpt2, llama

LARGE = 1024  # bytes; smaller requests are the framework's own
# A look of the engine at the CPU's random generator is a copy of its state; how many a step takes depends on the plan.
LOOK = torch.get_rng_state().nbytes
MAKERS: dict[str, Callable[..., torch.nn.Module]] = {"llama": llama, "gpt2": gpt2}
BATCH = batch_for(0, sequence=32)


@cache
def captured(name: str, dry: bool) -> Plan:
    """A plan with room for everything."""
    model = MAKERS[name](3, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    return stowplan.plan(
        model,
        BATCH,
        budget="1GiB",
        host_budget="1GiB",
        optimizer=optimizer,
        hold_output=False,
        dry=dry,
        allocations=True,
    )


def tight(plan: Plan, share: float) -> Plan:
    """The same with so much of the room between the least budget and that of everything kept."""
    room = plan.needed_bytes - plan.least_budget_bytes
    return stowplan.replan(plan, budget=plan.least_budget_bytes + int(room * share))


def real_step(name: str, plan: Plan | None) -> tuple[int, list[int]]:
    """Peak and sizes of the requests of one real step."""
    model = MAKERS[name](3, 32)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with stowplan.apply(plan, model) if plan is not None else nullcontext():
        for _ in range(3):
            step()
        gc.collect()
        gc.disable()
        try:
            with allocation_log(torch.device("cpu")) as log:
                step()
        finally:
            gc.enable()
    assert log.record is not None
    return max(s.peak_bytes for s in log.segments), [event for event in log.record.events if event >= LARGE]


def sizes(trace: AllocationTrace) -> Counter[int]:
    return Counter(a.size_bytes for a in trace.allocations if a.size_bytes >= LARGE)


@pytest.mark.parametrize("name", MAKERS)
def test_requests_are_those_of_a_real_step(name: str) -> None:
    trace = stowplan.allocations(captured(name, dry=False))
    peak_bytes, requested = real_step(name, None)
    assert sizes(trace) == Counter(requested)
    assert trace.bound_bytes == pytest.approx(peak_bytes, rel=1e-3)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_requests_are_those_of_a_real_step_under_a_plan(name: str, share: float) -> None:
    plan = tight(captured(name, dry=False), share)
    assert not plan.declined
    trace = stowplan.allocations(plan)
    peak_bytes, requested = real_step(name, plan)
    assert sizes(trace) == Counter({size: times for size, times in Counter(requested).items() if size != LOOK})
    assert trace.bound_bytes == pytest.approx(peak_bytes, rel=0.02)


@pytest.mark.parametrize("name", MAKERS)
def test_a_dry_capture_sees_the_same_requests(name: str) -> None:
    dry, real = (stowplan.allocations(captured(name, dry=dry)) for dry in (True, False))
    assert dry.bound_bytes == pytest.approx(real.bound_bytes, rel=0.01)
    num_dry, num_real = sizes(dry).total(), sizes(real).total()
    assert num_dry == pytest.approx(num_real, rel=0.02)


def some_decisions(problem: Problem, rng: random.Random) -> Decisions:
    """Any that are possible, rows and all."""
    chosen = []
    for block in problem.order:
        choices = problem.choices_of(block)
        row = []
        for position, actions in enumerate(choices.actions):
            decision = rng.choice(actions)
            num_rows = choices.num_rows[position]
            if num_rows and rng.random() < 0.4:
                first = rng.choice((0, *choices.splits[position]))
                split = decision_by_rows(num_rows, first, rng.randrange(num_rows - first + 1))
                decision = decision if choices.obstacle_to(position, split) else split
            row.append(decision)
        chosen.append(tuple(row))
    return tuple(chosen)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [0, 1, 2, 3])
def test_peaks_are_those_of_the_simulator(name: str, seed: int, window: int) -> None:
    """Under any decisions, with copies that stop compute (window 0) or go through staging blocks."""
    plan = captured(name, dry=False)
    hardware = replace(plan.hardware, overlapped_copies=window > 0, staging_blocks=max(1, window))
    problem = Problem(step=plan.step, hardware=hardware, budget_bytes=2**40, host_budget_bytes=2**40)
    decisions = some_decisions(problem, random.Random(seed))
    predicted = simulate(problem, decisions)
    trace = requests(plan.step, hardware, decisions)
    peak_bytes = predicted.peak_bytes - plan.step.static_bytes
    assert trace.bound_bytes == pytest.approx(peak_bytes, rel=1e-3)
    parts = trace.peak_bytes_by_part()
    assert parts.keys() == {moment.name for moment in predicted.moments}
    embeddings = 2 * 32 * 32 * 4  # the model holds them while blocks go forward, which predictions leave to block 0
    for moment in predicted.moments:
        expected = moment.peak_bytes - moment.static_bytes
        assert expected - 64 <= parts[moment.name] <= expected + embeddings + 64, moment.name


def test_kinds_are_what_decisions_make_of_values() -> None:
    plan = captured("llama", dry=False)
    kept = stowplan.allocations(plan, planned=False)
    assert {a.kind for a in kept.allocations} == {Kind.KEPT, Kind.TRANSIENT, Kind.GRADIENT}
    problem = Problem(step=plan.step, hardware=plan.hardware, budget_bytes=2**40, host_budget_bytes=2**40)
    decisions = some_decisions(problem, random.Random(1))
    trace = requests(plan.step, plan.hardware, decisions)
    by_kind = Counter(dict.fromkeys(Kind, 0))
    for allocation in trace.allocations:
        if allocation.segment.startswith("backward of"):
            by_kind[allocation.kind] += allocation.size_bytes
    values = [
        (program.values[index], decision)
        for number, chosen in enumerate(decisions)
        for program in [plan.step.program_of(number)]
        for index, decision in zip(program.saved, chosen, strict=True)
    ]
    assert by_kind[Kind.STAGED] == sum(value.size_bytes for value, decision in values if swaps(decision))
    whole = sum(value.size_bytes for value, decision in values if decision is Action.RECOMPUTE)
    split = sum(
        value.size_bytes for value, decision in values if not isinstance(decision, Action) and not decision.swapped
    )
    assert by_kind[Kind.RECOMPUTED] == whole + split
    parameters = sum(p.numel() for p in llama(3, 32).parameters()) * 4
    gradients = sum(a.size_bytes for a in trace.allocations if a.kind is Kind.GRADIENT)
    assert gradients == parameters


# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_addresses_are_good_and_within_the_budget(share: float) -> None:
    plan = tight(captured("llama", dry=False), share)
    addresses = addresses_of(plan)
    assert addresses is not None
    problem = packing_problem(addresses.trace, 64)
    offsets = torch.tensor(addresses.offsets).numpy()
    assert validate(problem, offsets, addresses.height_bytes) is None
    assert plan.arena_bytes == plan.step.static_bytes + addresses.height_bytes
    assert plan.prediction.peak_bytes - 64 <= plan.needed_bytes == plan.arena_bytes <= plan.budget_bytes


def test_a_plan_with_requests_reads_back() -> None:
    plan = tight(captured("gpt2", dry=False), 0.5)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_file_whose_requests_make_no_sense() -> None:
    plan = captured("llama", dry=False)
    outside = plan.step.outside
    assert outside is not None
    broken = replace(plan, step=replace(plan.step, outside=replace(outside, optimizer_step=(0,))))
    with pytest.raises(InvalidPlanFile, match=r"\$\.step\.outside\.optimizer_step: event 0 \(0\)"):
        Plan.from_json(broken.to_json())
    half = replace(plan, step=replace(plan.step, outside=None))
    with pytest.raises(InvalidPlanFile, match=r"allocations: goes with \$\.step\.outside"):
        Plan.from_json(half.to_json())


def test_the_report_has_a_map_of_addresses() -> None:
    text = stowplan.report(captured("llama", dry=False))
    words = " ".join(text.split())
    assert "ADDRESSES [trace]" in words
    assert "G gradient, K kept, S staged, C recomputed, T transient, . a hole." in words
    assert "addresses end at" in words
    assert all(len(line) <= 100 and line.isascii() for line in text.splitlines())


def test_a_plan_without_requests_says_how_to_get_them() -> None:
    model = llama(2, 32)
    plan = stowplan.plan(model, BATCH, budget="1GiB", host_budget="1GiB")
    assert plan.step.outside is None
    assert plan.arena_bytes is None
    assert "ADDRESSES" not in stowplan.report(plan)
    with pytest.raises(InvalidArgument, match="allocations=True"):
        stowplan.allocations(plan)


def test_without_addresses_cuda_has_an_allowance_for_fragmentation() -> None:
    model = llama(2, 32)
    gpu = Hardware(
        name="h100-sxm",
        device_type="cuda",
        device_bytes=2**36,
        matmul_flops_per_second=1e15,
        memory_bytes_per_second=1e12,
        to_host_bytes_per_second=1e10,
        to_device_bytes_per_second=1e10,
        overlapped_copies=True,
        host_bytes=2**36,
    )
    roomy: Any = stowplan.plan(model, BATCH, budget="1GiB", host_budget="1GiB", hardware=gpu)
    live = roomy.prediction.peak_bytes
    moving = live - roomy.step.static_bytes
    assert roomy.fragmentation == 0.05
    assert roomy.needed_bytes == live + -(-moving * 5 // 100)
    assert any("for fragmentation 5%" in line for line in roomy.assumptions)
    assert "for fragmentation (5% of what moves) on top" in " ".join(stowplan.report(roomy).split())
    least = stowplan.replan(roomy, budget=roomy.least_budget_bytes)
    assert least.needed_bytes <= least.budget_bytes
    with pytest.raises(stowplan.InfeasibleBudget) as failure:
        stowplan.replan(roomy, budget=roomy.least_budget_bytes - 4096)
    assert failure.value.least_bytes == pytest.approx(roomy.least_budget_bytes, rel=1e-6)
    assert failure.value.budget_bytes == roomy.least_budget_bytes - 4096


def test_a_budget_that_is_known_to_do_is_looked_for_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may not find in time what it has found before."""
    plan, seconds = captured("gpt2", dry=True), []

    def found_late(plan: Plan, solve: Solver) -> PlannedHead:
        seconds.append((solve.time_limit_seconds, solve.packing_seconds))
        if solve.time_limit_seconds < 50:
            raise stowplan.InfeasibleBudget(solve.device_bytes, solve.device_bytes + 128, 0, "")
        return replan_head(plan, solve)

    monkeypatch.setattr(planning, "replan_head", found_late)
    assert stowplan.replan(plan, budget=plan.least_budget_bytes).prediction
    assert seconds == [(5, 3), (50, 30)]
    with pytest.raises(stowplan.InfeasibleBudget):
        stowplan.replan(plan, budget=plan.least_budget_bytes - 1)
    assert len(seconds) == 3
