"""Snapshots of trainings on a CUDA device: copied by its own stream into page-locked memory, restored bit for bit."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stowplan
from stowplan.runtime.snapshot.memory.region import Region
from stowplan.runtime.snapshot.pinning import page_locked
from stowplan.runtime.snapshot.state.training_state import TrainingState, flatten
from tests import models

pytestmark = pytest.mark.gpu


def training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = models.gpt2(4, 256).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def run(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[str]:
    losses = []
    for step in steps:
        batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in models.batch_for(step, 4, 128).items()}
        loss = model(**batch).loss * (1 + 0.01 * torch.rand((), device="cuda"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item().hex())
    return losses


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="stow") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)
        yield


def test_a_training_goes_on_to_the_last_bit(sockets: None) -> None:
    options: dict[str, Any] = {"run": "cuda-1", "idle_seconds": 60}
    model, optimizer = training()
    with stowplan.Snapshotter(model=model, optimizer=optimizer, **options) as snapshots:
        assert snapshots.restore() is None
        run(model, optimizer, range(3))
        assert not snapshots.save(3).skipped
        assert snapshots.wait()
        expected = run(model, optimizer, range(3, 6))  # beside checksums; what was saved has been copied
    model, optimizer = training()
    run(model, optimizer, range(1))
    with stowplan.Snapshotter(model=model, optimizer=optimizer, **options) as snapshots:
        restored = snapshots.restore()
        assert restored is not None
        assert (restored.step, restored.exact) == (3, True)
        assert run(model, optimizer, range(3, 6)) == expected
        memory = snapshots.status().memory
        assert memory is not None
    os.kill(memory.pid, signal.SIGKILL)


def test_the_copy_is_over_when_it_returns() -> None:
    """The device is kept busy before; what is changed right after is not in the copy."""
    tensor = torch.zeros(64 << 20, device="cuda")
    flat = flatten(TrainingState(model={"m": torch.nn.Linear(1, 1)}, extras={"big": tensor}))
    region = Region.create("snapshots of a test", flat.num_bytes)
    unlock = page_locked(region.view)
    work = torch.randn(4096, 4096, device="cuda")
    for value in range(1, 9):
        for _ in range(20):
            work = work @ work / 64
        tensor.fill_(value)
        flat.copy_into(region.view)
        tensor.fill_(-1)
        offset = next(o for t, o in zip(flat.tensors, flat.offsets, strict=True) if t.numel() == tensor.numel())
        held = torch.frombuffer(region.view, dtype=torch.float32, offset=offset, count=tensor.numel())
        assert held.min().item() == held.max().item() == value
        del held
    unlock()
    region.close()
