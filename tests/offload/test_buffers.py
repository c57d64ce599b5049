"""Buffers are put back as they were: what is in them, and which tensors they are."""

from __future__ import annotations

import torch
from torch import nn

import stowplan
from stowplan.offload.buffers import Buffers


class Averaging(nn.Module):
    """Keeps a running mean by giving its buffer a new tensor at every call, and counts calls in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.num_calls += 1
        return self.linear(x - self.mean)


def test_replaced_and_rewritten_buffers_come_back() -> None:
    module = nn.Sequential(Averaging())
    mean, num_calls = module[0].mean, module[0].num_calls
    before = Buffers(module)
    module(torch.ones(2, 8))
    assert module[0].mean is not mean
    before.restore()
    assert module[0].mean is mean
    assert module[0].num_calls is num_calls
    assert (mean.sum().item(), num_calls.item()) == (0.0, 0)


def test_planning_leaves_reassigned_buffers_as_they_were() -> None:
    model = nn.Sequential(Averaging(), Averaging())
    buffers = dict(model.named_buffers())
    plan = stowplan.plan(model, torch.ones(4, 8), budget="1GiB", loss_fn=lambda output, batch: output.sum())
    assert plan.step.num_blocks == 2
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name], name
        assert not buffer.any(), name
