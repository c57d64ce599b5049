"""Schedule and activation plans of a pipeline, chosen together and carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import stowplan
from stowplan.core.errors import InfeasibleBudget, InvalidArgument
from stowplan.planner.schedule import simulate
from stowplan.planner.schedule.candidates import one_at_a_time
from tests.distributed import Ranks
from tests.runtime.pipeline.one_process import Case, batch_of, build, differing, truth

pytestmark = pytest.mark.slow  # processes of their own

CASE = Case(num_layers=6, num_microbatches=6, num_steps=1, rows=2, sequence=32, hidden=32)
TOLERANCE = 0.02


def new_pipeline(schedule: str = "v-half") -> stowplan.Pipeline:
    return stowplan.Pipeline(build(CASE), num_microbatches=CASE.num_microbatches, schedule=schedule)


def tight_budget(pipeline: stowplan.Pipeline) -> int:
    """Between the least and what keeping everything takes with one microbatch at a time."""
    with pytest.raises(InfeasibleBudget) as caught:
        stowplan.plan(pipeline, batch_of(CASE), budget=1, host_budget="1MiB")
    alone = one_at_a_time(pipeline.schedule.stage_devices, CASE.num_microbatches)
    schedule = alone if pipeline.schedule.splits_backward else alone.joined()
    kept = max(simulate(schedule, pipeline.probe(batch_of(CASE))).peaks_bytes)
    assert caught.value.least_bytes < kept
    return pipeline.link.told((caught.value.least_bytes + kept) // 2)


def gradients(pipeline: stowplan.Pipeline) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in pipeline.named_parameters() if parameter.grad is not None}


def planned(rank: int, path: str, schedule: str) -> dict[str, Any]:
    pipeline = new_pipeline(schedule)
    budget = tight_budget(pipeline)
    said: list[str] = []
    plan = stowplan.plan(pipeline, batch_of(CASE), budget=budget, host_budget="1MiB", on_progress=said.append)
    assert all(parameter.grad is None for parameter in pipeline.parameters())  # nothing has changed
    before = pipeline.schedule
    expected = torch.load(path)
    with stowplan.apply(plan, pipeline) as handle:
        assert pipeline.schedule == plan.schedule
        for _ in range(3):  # recordings, then steps that follow the tape
            for parameter in pipeline.parameters():
                parameter.grad = None
            loss = pipeline.step(batch_of(CASE))
            assert differing(gradients(pipeline), expected["gradients"][0]) == []
            assert loss is None or torch.equal(loss, expected["losses"][0])
        trace = pipeline.measure(batch_of(CASE))
        moved = sum(h.counters.recomputed_bytes + h.counters.swapped_bytes for h in handle.stages.values())
        departures = sum(h.counters.departures for h in handle.stages.values())
    assert pipeline.schedule == before
    pipeline.step(batch_of(CASE))
    return {
        "budget": plan.budget_bytes,
        "levels": plan.levels,
        "predicted": plan.timeline.peaks_bytes,
        "measured": trace.peaks_bytes,
        "moved": moved,
        "departures": departures,
        "text": stowplan.report(plan),
        "said": said,
    }


@pytest.mark.parametrize("schedule", ["v-half", "1f1b"])
def test_planned_pipelines_hold_their_budget_and_compute_the_same(ranks: Ranks, tmp_path: Path, schedule: str) -> None:
    answers = ranks.run(planned, truth(CASE, tmp_path / "truth.pt"), schedule)
    first = answers[0]
    for answer in answers:
        assert (answer["levels"], answer["predicted"]) == (first["levels"], first["predicted"])
        assert max(answer["predicted"]) <= answer["budget"]
        for predicted, measured in zip(answer["predicted"], answer["measured"], strict=True):
            assert abs(measured / predicted - 1) <= TOLERANCE
        assert answer["departures"] == 0
    assert any(first["levels"])
    assert sum(answer["moved"] for answer in answers) > 0
    assert "planning stage 0" in first["said"][0]
    assert "tried, by the level" in first["text"]
    assert max(map(len, first["text"].splitlines())) <= 100


def refused(rank: int) -> list[int]:
    pipeline = new_pipeline()
    with pytest.raises(InvalidArgument, match="allowed beside the batch are"):
        stowplan.plan(pipeline, batch_of(CASE), blocks="model.layers")  # type: ignore[call-overload]
    plan = stowplan.plan(pipeline, batch_of(CASE), budget=tight_budget(pipeline), host_budget="1MiB")
    with pytest.raises(InvalidArgument, match="a PipelinePlan does not go with a Linear"):
        stowplan.apply(plan, torch.nn.Linear(2, 2))  # type: ignore[call-overload]
    return plan.timeline.peaks_bytes


def test_wrong_arguments_are_refused(ranks: Ranks) -> None:
    assert ranks.run(refused)[0]


def beside_snapshots(rank: int) -> tuple[int, int, bool]:
    pipeline = new_pipeline()
    optimizer = torch.optim.AdamW(pipeline.parameters())
    options: dict[str, Any] = {"budget": "1GiB", "optimizer": optimizer, "snapshots": stowplan.SnapshotMemory()}
    with pytest.raises(InfeasibleBudget, match="snapshots take") as caught:
        stowplan.plan(pipeline, batch_of(CASE), host_budget="1MiB", **options)
    plan = stowplan.plan(pipeline, batch_of(CASE), host_budget="64MiB", **options)
    return caught.value.snapshot_bytes, plan.snapshot_bytes, "Snapshots take" in stowplan.report(plan)


def test_all_devices_leave_room_for_the_largest_one_s_snapshots(ranks: Ranks) -> None:
    found = ranks.run(beside_snapshots)
    taken = found[0][0]
    assert taken > 0
    assert found == [(taken, taken, True)] * 2
