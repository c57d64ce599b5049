"""The peak that is predicted for each device is the one that its allocator shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stowplan.core.schedule import Schedule
from stowplan.runtime.pipeline.measure import StepTrace
from stowplan.runtime.pipeline.pipeline import Pipeline
from tests.distributed import Ranks
from tests.runtime.pipeline.one_process import Case, adaptive, batch_of, build

pytestmark = pytest.mark.slow  # processes of their own

TOLERANCE = 0.02
NAMES = ["1f1b", "v-min", "v-half", "v-zb", "adaptive"]


def peaks(rank: int, case: Case, schedule: str | Schedule) -> tuple[list[int], list[int], list[int]]:
    """Predicted, measured in the second step, and bytes that are there without a step, of all devices."""
    torch.manual_seed(rank)
    pipeline = Pipeline(build(case), num_microbatches=case.num_microbatches, schedule=schedule)
    batch = batch_of(case)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.amp):
        costs = pipeline.probe(batch)
        predicted = pipeline.predict(costs)
        pipeline.step(batch)
        trace: StepTrace = pipeline.measure(batch)
    static = [
        sum(costs.stages[stage].static_bytes for stage in pipeline.schedule.stages_of(device))
        for device in range(pipeline.size)
    ]
    return predicted.peaks_bytes, trace.peaks_bytes, static


def cases() -> Iterator[Any]:
    """Some of them by default."""
    default = {(2, name, False) for name in NAMES} | {(4, name, True) for name in ("v-min", "v-half")}
    default |= {(2, "v-zb", True), (4, "adaptive", False), (4, "1f1b", False), (8, "v-half", False)}
    for size in (2, 4, 8):
        for name in NAMES:
            for amp in (False, True):
                marks = () if (size, name, amp) in default else pytest.mark.full
                yield pytest.param(size, name, amp, marks=marks, id=f"{size}-{name}-{'bf16' if amp else 'fp32'}")


@pytest.mark.parametrize(("size", "name", "amp"), list(cases()))
def test_peaks(request: pytest.FixtureRequest, size: int, name: str, amp: bool) -> None:
    ranks: Ranks = request.getfixturevalue({2: "ranks", 4: "ranks4", 8: "ranks8"}[size])
    case = Case(num_layers=16, num_microbatches=2 * size, amp=amp, rows=2, sequence=64, hidden=32)
    schedule = adaptive(size, case.num_microbatches, 1 + size // 2) if name == "adaptive" else name
    answers = ranks.run(peaks, case, schedule)
    assert all(answer == answers[0] for answer in answers)  # every process knows all of it
    for predicted, measured, static in zip(*answers[0], strict=True):
        assert measured > 3 * static  # activations are what is looked at
        assert predicted == pytest.approx(measured, rel=TOLERANCE)
