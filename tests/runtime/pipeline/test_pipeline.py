"""A pipeline of processes computes what one process does: losses, gradients and trained parameters, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stowplan.core.schedule import Schedule
from stowplan.runtime.pipeline.pipeline import Pipeline
from tests.distributed import Ranks
from tests.runtime.pipeline.one_process import (
    Case,
    adaptive,
    batch_of,
    build,
    differing,
    optimizer_of,
    truth,
)

pytestmark = pytest.mark.slow  # processes of their own

NAMES = ["gpipe", "1f1b", "zb-h1", "interleaved", "v-min", "v-half", "v-zb", "adaptive"]


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The truth of a case, computed once."""
    folder = tmp_path_factory.mktemp("truths")
    made: dict[Case, str] = {}

    def find(case: Case) -> str:
        if case not in made:
            made[case] = truth(case, folder / str(len(made)))
        return made[case]

    return find


def schedule_of(name: str, num_devices: int, num_microbatches: int) -> str | Schedule:
    if name != "adaptive":
        return name
    found = adaptive(num_devices, num_microbatches, limit=max(1, num_devices // 2))
    assert any(action.kind == "W" for order in found.orders for action in order)
    return found


def train(rank: int, case: Case, schedule: str | Schedule, path: str) -> tuple[list[str], bool]:
    """Gives the names of the parameters here, and whether the loss is here."""
    expected = torch.load(path)
    pipeline = Pipeline(build(case), num_microbatches=case.num_microbatches, schedule=schedule)
    optimizer = optimizer_of(pipeline.parameters())
    for step in range(case.num_steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=case.amp):
            loss = pipeline.step(batch_of(case, step))
        assert (loss is not None) == pipeline.has_loss
        if loss is not None:
            assert torch.equal(loss, expected["losses"][step])
        gradients = {name: p.grad for name, p in pipeline.named_parameters()}
        assert differing(gradients, expected["gradients"][step]) == []
        optimizer.step()
        optimizer.zero_grad()
    own = {name: p.detach() for name, p in pipeline.named_parameters()}
    assert differing(own, expected["parameters"]) == []
    return list(own), pipeline.has_loss


def check_training(ranks: Ranks, truths: Any, case: Case, name: str) -> None:
    schedule = schedule_of(name, ranks.size, case.num_microbatches)
    answers = ranks.run(train, case, schedule, truths(case))
    names = [name for own, _ in answers for name in own]
    assert sorted(names) == sorted(name for name, _ in build(case).named_parameters())
    assert [has_loss for _, has_loss in answers].count(True) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_two_processes(ranks: Ranks, truths: Any, model: str, name: str) -> None:
    check_training(ranks, truths, Case(model), name)


@pytest.mark.parametrize("name", NAMES)
def test_four_processes(ranks4: Ranks, truths: Any, name: str) -> None:
    check_training(ranks4, truths, Case(num_layers=9, num_microbatches=8), name)


def slower(names: list[str], *short: str) -> list[Any]:
    """All but ``short`` are for the full run."""
    return [name if name in short else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", slower(NAMES, "v-half", "adaptive"))
def test_eight_processes(ranks8: Ranks, truths: Any, name: str) -> None:
    check_training(ranks8, truths, Case(num_layers=16, num_microbatches=8, num_steps=2), name)
