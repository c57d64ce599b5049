"""One rank of a training with snapshots, which things happen to. Forked with torch and all this imported.

It says on stdout what it does: RESTORED, PARAMETERS, LOSS, STEP, HELD, DONE; rank 0 writes the final parameters.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stowplan.core.errors import SnapshotProcessUnavailable
from stowplan.runtime.snapshot.exchange.limits import SnapshotLimits
from stowplan.runtime.snapshot.snapshotter import Saved, Snapshotter
from tests.models import VOCABULARY, llama
from tests.runtime.snapshot.replicated import data_parallel

__all__ = ["Training", "train"]

_PR_SET_PDEATHSIG = 1
_PATIENCE_SECONDS = 5.0
_TIMEOUT_SECONDS = 5.0  # of a request between nodes


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all ranks of a job are told."""

    steps: int = 6
    interval: int = 1
    m: int = 1
    disk: Path | None = None
    disk_interval: int | None = None
    wait: bool = True  # after each step, until the newest snapshot is complete
    hold_at: tuple[int, ...] = ()  # after these steps, until somebody makes the file GO-STEP or kills the rank
    pause_seconds: float = 0.0  # in each step
    replicated: bool = False  # DistributedDataParallel, not FSDP2


class Tokens:
    """Random tokens whose generator is part of the snapshot."""

    def __init__(self, rank: int) -> None:
        self.generator = torch.Generator().manual_seed(rank)

    def next(self) -> torch.Tensor:
        return torch.randint(1, VOCABULARY, (2, 8), generator=self.generator)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.generator.set_state(state["generator"])


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def train(place: Path, rank: int, world_size: int, environment: dict[str, str], training: Training) -> None:
    """What a forked process does; ``place`` is this start's own directory."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(environment)
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    faulthandler.register(signal.SIGUSR1, file=2)
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{place}/rendezvous", rank=rank, world_size=world_size)
    _run(place, rank, world_size, training)
    if world_size > 1:
        dist.destroy_process_group()


def _run(place: Path, rank: int, world_size: int, training: Training) -> None:
    model = llama(num_blocks=2)
    if training.replicated:
        model = data_parallel(model)
    elif world_size > 1:
        mesh = init_device_mesh("cpu", (world_size,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    data = Tokens(rank)
    torch.manual_seed(1000 + rank)
    with Snapshotter(
        model=model, optimizer=optimizer, scheduler=scheduler, data=data, interval=training.interval, m=training.m,
        limits=SnapshotLimits(timeout_seconds=_TIMEOUT_SECONDS), directory=training.disk,
        disk_interval=training.disk_interval, idle_seconds=60,
    ) as snapshots:  # fmt: skip
        say("GENERATION", snapshots.generation)
        restored = snapshots.restore()
        step = restored.step if restored else 0
        say("RESTORED", step if restored else "nothing", "exact" if restored and restored.exact else "")
        if restored:
            say("PARAMETERS", step, _fingerprint(model))
        while step < training.steps:
            tokens = data.next()
            tokens = tokens * (torch.rand(tokens.shape) > 0.1)  # drops some, by torch's own generator
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            say("LOSS", step, loss.item().hex())
            time.sleep(training.pause_seconds)
            saved = snapshots.save(step)
            say("STEP", step, saved.skipped or "saved", *(_until_complete(snapshots, saved) if training.wait else ()))
            if step in training.hold_at:
                say("PARAMETERS", step, _fingerprint(model))
                say("HELD", step)
                while not (place / f"GO-{step}").exists():
                    time.sleep(0.05)
        _end(place, rank, model, snapshots)


def _end(place: Path, rank: int, model: torch.nn.Module, snapshots: Snapshotter) -> None:
    final = _whole(model)
    if rank == 0:
        torch.save(final, place / "final.new")
        (place / "final.new").rename(place / "final.pt")
    if snapshots.status().disk:
        say("DISK", snapshots.status().disk)
    say("DONE")


def _whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters = model.named_parameters()
    return {name: each.full_tensor() if hasattr(each, "full_tensor") else each.detach() for name, each in parameters}


def _fingerprint(model: torch.nn.Module) -> str:
    content = hashlib.sha256()
    for parameter in _whole(model).values():
        content.update(parameter.detach().numpy().tobytes())
    return content.hexdigest()


def _until_complete(snapshots: Snapshotter, saved: Saved) -> tuple[str, ...]:
    try:
        return () if snapshots.wait(_PATIENCE_SECONDS) or saved.skipped else ("and given up",)
    except SnapshotProcessUnavailable:
        return ("and the memory process is gone",)
