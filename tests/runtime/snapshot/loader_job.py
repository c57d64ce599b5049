"""A training over torchdata's loader, to be killed.

``python -m tests.runtime.snapshot.loader_job WORKERS KILLED_AFTER`` says, as JSON, which samples it saw, its losses and
its last parameters; with KILLED_AFTER 0 it trains once more from the beginning, without snapshots, and says the same.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from stowplan.runtime.snapshot.snapshotter import Snapshotter

NUM_SAMPLES, BATCH, NUM_STEPS = 20, 2, 25  # two epochs and a half


class Numbers(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Each sample is its number and some noise that only depends on it."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        noise = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"index": torch.tensor(index), "x": noise}


class Training:
    """Draws random numbers of its own, beside the loader's: dropout."""

    def __init__(self, num_workers: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.loader: Any = StatefulDataLoader(Numbers(), batch_size=BATCH, shuffle=True, num_workers=num_workers)
        self.step = 0
        self.seen: list[tuple[int, list[int], str]] = []

    def run(self, until: int, snapshots: Snapshotter | None = None) -> None:
        while self.step < until:
            for batch in self.loader:
                loss = self.model(batch["x"]).square().mean()
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.step += 1
                self.seen.append((self.step, batch["index"].tolist(), loss.item().hex()))
                if snapshots is not None:
                    assert not snapshots.save(self.step).skipped
                    assert snapshots.wait()
                if self.step == until:
                    break

    def said(self) -> str:
        parameters = [number.hex() for p in self.model.parameters() for number in p.flatten().tolist()]
        return json.dumps({"seen": self.seen, "parameters": parameters, "next": torch.rand(1).item().hex()})


def main() -> None:
    num_workers, killed_after = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    training = Training(num_workers)
    parts = {"model": training.model, "optimizer": training.optimizer, "data": training.loader}
    with Snapshotter(**parts, run="job-1", idle_seconds=60) as snapshots:
        restored = snapshots.restore()
        training.step = restored.step if restored else 0
        training.run(killed_after or NUM_STEPS, snapshots)
        print(training.said(), flush=True)
        pid = snapshots.status().memory.pid
        if killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    again = Training(num_workers)
    again.run(NUM_STEPS)
    print(again.said())


if __name__ == "__main__":
    main()
