"""One rank of a training with snapshots, to be killed: ``python -m tests.runtime.snapshot.job DIRECTORY STEPS``.

Ranks, node and run are in the environment. It says on stdout what it does, and writes its final parameters.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stowplan.runtime.snapshot.snapshotter import Snapshotter
from tests.models import llama
from tests.runtime.snapshot.replicated import data_parallel

WORLD_SIZE = 4


class Tokens:
    """Random tokens whose generator is part of the snapshot."""

    def __init__(self, rank: int) -> None:
        self.generator = torch.Generator().manual_seed(rank)

    def next(self) -> torch.Tensor:
        return torch.randint(0, 32, (2, 8), generator=self.generator)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.generator.set_state(state["generator"])


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--kill-at", type=int, default=-1, help="in the middle of this step this rank is killed")
    parser.add_argument("--kill-node", action="store_true", help="with its memory process")
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--interval", type=int, default=1)
    parser.add_argument("--replicated", action="store_true", help="DistributedDataParallel, not FSDP2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    meeting = f"file://{options.directory}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD_SIZE)
    torch.manual_seed(0)
    model = llama(num_blocks=2)
    if options.replicated:
        model = data_parallel(model)
    else:
        mesh = init_device_mesh("cpu", (WORLD_SIZE,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    data = Tokens(rank)
    with Snapshotter(
        model=model, optimizer=optimizer, scheduler=scheduler, data=data, interval=options.interval,
        directory=options.disk, idle_seconds=60,
    ) as snapshots:  # fmt: skip
        restored = snapshots.restore()
        step = restored.step if restored else 0
        say("RESTORED", step if restored else "nothing")
        while step < options.steps:
            tokens = data.next()
            loss = model(tokens, labels=tokens).loss
            if step == options.kill_at:
                if options.kill_node:
                    os.kill(snapshots.status().memory.pid, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            saved = snapshots.save(step)
            say("STEP", step, saved.skipped or f"saved {saved.num_bytes}")
            if not saved.skipped and not snapshots.wait():
                say("LATE", *snapshots.status().memory.reduced)
        final = {
            name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            for name, parameter in model.named_parameters()
        }
        if rank == 0:
            torch.save(final, options.directory / "final.pt")
    say("DONE", time.process_time())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
