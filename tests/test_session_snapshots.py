"""Plans beside snapshots: the host budget is for both, and what snapshots take is not swapped into."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import stowplan
from stowplan.core.hardware import preset
from stowplan.core.plan import SnapshotBytes
from stowplan.core.units import GIB, MIB
from stowplan.reports.text import render
from stowplan.runtime.snapshot.memory.region import Region
from stowplan.session import making
from tests import models
from tests.plans import LAYER, example_plan, step_of

SHAPE = {"batch": 2, "sequence": 128}
MEMORY = stowplan.SnapshotMemory(num_nodes=3)


def planned(**options) -> stowplan.Plan:
    model = models.llama(num_blocks=4)
    optimizer = torch.optim.AdamW(model.parameters())
    return stowplan.plan(model, models.batch_for(0, **SHAPE), optimizer=optimizer, **options)


@pytest.fixture(scope="module")
def roomy() -> stowplan.Plan:
    return planned(budget="1GiB", host_budget="1GiB", snapshots=MEMORY)


def tight(plan: stowplan.Plan, host_bytes: int) -> stowplan.Plan:
    """A plan for a device budget that some swapping is needed for."""
    return stowplan.replan(plan, budget=plan.least_budget_bytes, host_budget=host_bytes)


def test_what_is_left_of_the_host_budget_is_all_that_is_swapped_into(roomy):
    taken = roomy.snapshots.total_bytes
    assert roomy.swap_budget_bytes == GIB - taken
    assert taken >= 2 * (roomy.snapshots.data_bytes + roomy.snapshots.parity_bytes) > 0
    alone = replace(roomy, snapshots=None)
    swapped = tight(alone, GIB).prediction.host_bytes
    assert swapped > 0
    assert tight(roomy, taken + swapped).decisions == tight(alone, swapped).decisions


def test_a_host_budget_that_snapshots_alone_exceed_is_refused_and_the_least_one_works(roomy):
    taken = roomy.snapshots.total_bytes
    with pytest.raises(stowplan.InfeasibleBudget, match="snapshots take ") as caught:
        tight(roomy, taken - MIB)
    error = caught.value
    assert (error.host_budget_bytes, error.snapshot_bytes) == (taken - MIB, taken)
    assert f"The least host budget is {error.least_host_bytes / MIB:.2f} MiB" in str(error)
    assert tight(roomy, error.least_host_bytes).host_budget_bytes == error.least_host_bytes >= taken


@pytest.mark.parametrize("left_bytes", [0, -1])
def test_what_has_to_be_swapped_counts_in_the_least_host_budget(left_bytes):
    size = SnapshotBytes(data_bytes=GIB, parity_bytes=0, total_bytes=2 * GIB)
    program = replace(LAYER, gradient_bytes=0)  # the peak is of kept values, and blocks' inputs cannot be recomputed
    plan = replace(example_plan(), step=step_of(program, 12), snapshots=size)
    with pytest.raises(stowplan.InfeasibleBudget) as caught:
        stowplan.replan(plan, time_limit_seconds=60, budget=1000, host_budget=2**50)
    budget = caught.value.least_bytes
    with pytest.raises(stowplan.InfeasibleBudget) as caught:
        stowplan.replan(plan, time_limit_seconds=60, budget=budget, host_budget=2 * GIB + left_bytes)
    least = caught.value.least_host_bytes
    assert least > 2 * GIB
    assert (
        stowplan.replan(plan, time_limit_seconds=60, budget=budget, host_budget=least).prediction.host_bytes
        <= least - 2 * GIB
    )
    with pytest.raises(stowplan.InfeasibleBudget):
        stowplan.replan(plan, time_limit_seconds=60, budget=budget, host_budget=2 * GIB + (least - 2 * GIB) * 9 // 10)


def test_a_budget_that_no_host_budget_helps_says_so(roomy):
    with pytest.raises(stowplan.InfeasibleBudget) as caught:
        stowplan.replan(roomy, budget=1000)
    assert caught.value.least_host_bytes is None


def test_the_file_and_the_report_have_it(roomy):
    assert stowplan.Plan.from_json(roomy.to_json()) == roomy
    flowing = " ".join(render(roomy).split())
    assert f"Snapshots: {roomy.snapshots.total_bytes / MIB:.2f} MiB of the host budget of 1.00 GiB, for" in flowing
    assert "Snapshots:" not in render(replace(roomy, snapshots=None))


def test_auto_offers_what_the_ranks_of_the_node_leave(monkeypatch):
    free = 3 * GIB
    monkeypatch.setattr(making, "host_budget_bytes", lambda: free)
    memory = stowplan.SnapshotMemory(ranks_per_node=4)
    plan = planned(budget="1GiB", snapshots=memory)
    taken = plan.snapshots.total_bytes
    assert plan.swap_budget_bytes == free - 4 * taken
    region = Region.create("held", taken)  # what snapshots have already is free for them
    monkeypatch.setattr(making, "host_budget_bytes", lambda: free - 4 * taken)
    assert planned(budget="1GiB", snapshots=memory).swap_budget_bytes == plan.swap_budget_bytes
    region.close()


def test_without_an_optimizer_its_states_are_not_counted_which_is_said(roomy):
    model = models.llama(num_blocks=4)
    plan = stowplan.plan(model, models.batch_for(0, **SHAPE), budget="1GiB", host_budget="1GiB", snapshots=MEMORY)
    assert plan.snapshots.data_bytes < roomy.snapshots.data_bytes
    assert any("without optimizer states" in said for said in plan.assumptions)


def test_wrap_counts_them_too():
    model = models.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    stowplan.wrap(model, budget="1GiB", host_budget="1GiB", optimizer=optimizer, snapshots=MEMORY)
    models.train(model, 1, **SHAPE)
    assert stowplan.applied(model).plan.snapshots.total_bytes > 0
    stowplan.applied(model).remove()


def test_auto_for_a_machine_that_is_not_here_is_of_its_host_s_memory():
    machine = replace(preset("h100-sxm"), host_bytes=64 * GIB)
    memory = stowplan.SnapshotMemory(ranks_per_node=8)
    alone = planned(budget="1GiB", hardware=machine)
    beside = planned(budget="1GiB", hardware=machine, snapshots=memory)
    assert beside.swap_budget_bytes == alone.swap_budget_bytes - 8 * beside.snapshots.total_bytes
