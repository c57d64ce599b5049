"""torch's own runtime takes the schedules that are saved as CSV, and gives the same gradients, with its own splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from stowplan.core.schedule import Schedule
from stowplan.planner.schedule import generate
from stowplan.runtime.pipeline.pipeline import Pipeline
from tests.distributed import Ranks
from tests.runtime.pipeline.one_process import adaptive, differing

pytestmark = pytest.mark.slow  # processes of their own

NUM_MICROBATCHES, ROWS, WIDTH = 8, 2, 16


class Residual(torch.nn.Module):
    """Something with weights that both runtimes defer, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.nn.functional.gelu(self.up(self.norm(hidden))))


def modules(count: int) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [Residual() for _ in range(count)]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (NUM_MICROBATCHES * ROWS, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def by_torch(schedule: Schedule, rank: int, path: str) -> dict[str, torch.Tensor]:
    """Gradients of this rank's modules by their names in the sequence."""
    own = {number: modules(schedule.num_stages)[number] for number in schedule.stages_of(rank)}
    stages = [PipelineStage(module, number, schedule.num_stages, torch.device("cpu")) for number, module in own.items()]
    runtime = _PipelineScheduleRuntime(stages, NUM_MICROBATCHES, loss_fn=torch.nn.functional.mse_loss)
    runtime._load_csv(path, "compute_only")
    inputs, target = data()
    runtime.step(*([inputs] if 0 in own else []), target=target if schedule.num_stages - 1 in own else None)
    return {f"{number}.{name}": p.grad for number, module in own.items() for name, p in module.named_parameters()}


def compare(rank: int, schedule: Schedule, path: str) -> int:
    expected = by_torch(schedule, rank, path)
    pipeline = Pipeline(
        modules(schedule.num_stages),
        num_microbatches=NUM_MICROBATCHES,
        schedule=schedule,
        loss_fn=torch.nn.functional.mse_loss,
    )
    pipeline.step(data())
    gradients: Any = {name: p.grad for name, p in pipeline.named_parameters()}
    assert gradients.keys() == expected.keys()
    assert differing(gradients, expected, relative=1e-6) == []
    return len(gradients)


@pytest.mark.parametrize("name", ["v-half", "v-min", "v-zb", "1f1b", "adaptive"])
def test_the_same_gradients(ranks4: Ranks, tmp_path: Path, name: str) -> None:
    schedule = adaptive(4, NUM_MICROBATCHES, 2) if name == "adaptive" else generate(name, 4, NUM_MICROBATCHES)
    schedule.save_csv(tmp_path / "schedule.csv")
    assert sum(ranks4.run(compare, schedule, str(tmp_path / "schedule.csv"))) == 6 * schedule.num_stages
