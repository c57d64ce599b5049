"""What only a CUDA device can tell: exactness with its generators and kernels, and the allocator's own peak."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stowplan import session
from stowplan.core.errors import BudgetExceeded, ReplayMismatch
from stowplan.core.program import Action
from tests import models
from tests.plans import random_decisions

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _device() -> None:
    if not torch.cuda.is_available():
        pytest.fail("the gpu tests were asked for, and there is no CUDA device")


def batch_on_device(sequence: int = 256) -> dict[str, object]:
    batch = models.batch_for(0, batch=2, sequence=sequence)
    return {name: item.cuda() if isinstance(item, torch.Tensor) else item for name, item in batch.items()}


def train(model: torch.nn.Module, amp: bool) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7)
    seen = []
    for _ in range(4):
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            loss = model(**batch_on_device()).loss
        loss.backward()
        seen += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *(p.detach().clone() for p in model.parameters()), torch.rand(1, device="cuda")]


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("build", [models.llama, models.gpt2])
@pytest.mark.parametrize("seed", range(10))
def test_random_plans_are_exact(build: object, amp: bool, seed: int) -> None:
    assert callable(build)
    model = build(hidden=64).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        plan = session.plan(model, batch_on_device(), budget="8GiB", host_budget="1GiB")
    drawn = random_decisions(plan, seed)
    assert any(action is not Action.KEEP for actions in drawn.decisions for action in actions)
    expected = train(build(hidden=64).cuda(), amp)
    model = build(hidden=64).cuda()
    with session.apply(drawn, model):
        seen = train(model, amp)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_predicted_peak_is_the_allocators() -> None:
    model = models.llama(num_blocks=6, hidden=256).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = batch_on_device(1024)
    plan = session.plan(model, batch, budget="8GiB", optimizer=optimizer)
    middle = session.replan(plan, budget=(plan.unplanned.peak_bytes + plan.least_budget_bytes) // 2)
    with session.apply(middle, model):
        for _ in range(3):
            output = model(**batch)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with session.measure(model) as measured:
            output = model(**batch)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert measured.measurement.peak_bytes[0] == pytest.approx(middle.prediction.peak_bytes, rel=0.02)


def test_the_automatic_budget_is_what_nvml_leaves() -> None:
    plan = session.plan(models.llama().cuda(), batch_on_device(16))
    assert 0 < plan.budget_bytes < torch.cuda.get_device_properties(0).total_memory


class Knob:
    """A number that no signature sees."""

    scale = 1.0


class Turned(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.sin(self.first(x) * Knob.scale))


@pytest.mark.parametrize("verify", ["sample", "all"])
def test_a_failed_check_is_told_before_the_optimizer_steps(verify: str) -> None:
    """Backward itself ends without waiting for the verdicts."""
    Knob.scale = 1.0
    model = torch.nn.Sequential(Turned(), Turned()).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(32, 64, device="cuda")
    roomy = session.plan(model, x, budget="1GiB", host_budget="1GiB", loss_fn=lambda output, batch: output.sum())
    recomputed = tuple(
        tuple(Action.RECOMPUTE if Action.RECOMPUTE in p.values[i].actions else Action.KEEP for i in p.saved)
        for p in (roomy.step.program_of(block) for block in range(2))
    )
    with session.apply(replace(roomy, decisions=recomputed), model, verify=verify):
        for _ in range(3):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        Knob.scale = 0.5
        torch.stack([model(x).sum() for _ in range(4)]).sum().backward()
        with pytest.raises(ReplayMismatch, match="not what the forward pass had"):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_above_the_budget_is_seen_in_passing() -> None:
    model = models.llama(num_blocks=4, hidden=64).cuda()
    plan = session.plan(model, batch_on_device(), budget="8GiB", host_budget="1GiB")
    low = session.replan(plan, budget=(plan.unplanned.peak_bytes + plan.least_budget_bytes) // 2)
    with session.apply(low, model, strict=True):
        for _ in range(4):
            model(**batch_on_device()).loss.backward()
            model.zero_grad()
        ballast = torch.empty(low.budget_bytes, dtype=torch.uint8, device="cuda")
        model(**batch_on_device()).loss.backward()
        del ballast
        with pytest.raises(BudgetExceeded):
            model(**batch_on_device())
