"""Where measured steps begin and end, and what a meter leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import stowplan


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def _num_hooks(model: nn.Module) -> int:
    return len(model._forward_pre_hooks) + len(torch_optimizer._global_optimizer_post_hooks)


def test_a_measurement_inside_another_is_refused_and_leaves_no_hooks() -> None:
    model = _model()
    before = _num_hooks(model)
    with stowplan.measure(model) as outer:
        opened = _num_hooks(model)
        with pytest.raises(stowplan.InvalidArgument, match="is active in this thread"), stowplan.measure(model):
            pass
        assert _num_hooks(model) == opened
        model(torch.ones(2, 8)).sum().backward()
    assert _num_hooks(model) == before
    assert len(outer.measurement.step_seconds) == 1


def test_the_optimizer_of_another_model_ends_no_step() -> None:
    model, other = _model(), _model()
    own, others = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    with stowplan.measure(model) as measured:
        for _ in range(2):
            for _ in range(3):  # micro-batches, between which another model is trained
                model(torch.ones(2, 8)).sum().backward()
                other(torch.ones(2, 8)).sum().backward()
                others.step()
            own.step()
            own.zero_grad()
    assert len(measured.measurement.step_seconds) == 2
