"""A small training with everything that exact resumption needs, for one process and for FSDP2."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stowplan.runtime.snapshot.state.training_state import TrainingState

NUM_STEPS, SNAPSHOT_AT = 12, 5


class ShuffledRows:
    """Rows of data in an order that is drawn anew in each epoch; its position can be saved."""

    def __init__(self, seed: int, num_rows: int = 24, batch_rows: int = 4) -> None:
        self.rows = torch.randn(num_rows, 8, generator=torch.Generator().manual_seed(seed))
        self.batch_rows, self.position = batch_rows, 0
        self.order = torch.randperm(num_rows)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        if self.position == len(self.order):
            self.order, self.position = torch.randperm(len(self.order)), 0
        begin, self.position = self.position, self.position + self.batch_rows
        return self.rows[self.order[begin : self.position]]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = state["order"].clone(), state["position"]


class Net(nn.Module):
    """Tied ends, a buffer, dropout; 9 × 16 middle weights do not divide evenly over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16, bias=False)
        self.norm = nn.BatchNorm1d(16)
        self.middle = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 16), nn.Dropout(0.1))
        self.last = nn.Linear(16, 8, bias=False)
        self.last.weight = nn.Parameter(torch.empty(8, 16).uniform_(-0.3, 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x))
        return self.last(hidden + self.middle(hidden))


class Training:
    """One rank's training."""

    def __init__(self, rank: int = 0, *, mesh: tuple[int, ...] = (), optimizer: str = "adamw") -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Net()
        if mesh:
            devices = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :])
            for module in (self.model.middle, self.model.last):
                fully_shard(module, mesh=devices)
            fully_shard(self.model, mesh=devices)
        for generator, seed in ((torch.manual_seed, 100), (random.seed, 200), (np.random.seed, 300)):
            generator(seed + rank)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        if optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1e-2, amsgrad=True)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, NUM_STEPS)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        self.data = ShuffledRows(seed=rank)
        self.noise = torch.Generator().manual_seed(7 + rank)
        self.step = 0

    def state(self) -> TrainingState:
        return TrainingState(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            data=self.data,
            extras={"noise": self.noise, "notes": {"name": "run", 3: (1, 2.5)}},
            step=self.step,
        )

    def run(self, until: int) -> list[str]:
        """Train; gives losses as hexadecimal numbers."""
        losses = []
        while self.step < until:
            x = next(self.data)
            x = x * (1 + 0.01 * random.random()) + 0.01 * float(np.random.randn())
            x = x + 0.01 * torch.randn(x.shape, generator=self.noise)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (self.model(x).float() - 1).pow(2).mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.step += 1
            losses.append(loss.item().hex())
        return losses

    def fingerprint(self) -> dict[str, bytes]:
        """Every bit of parameters, buffers and optimizer states that this rank has, and the next random numbers."""
        found = {name: raw(tensor) for name, tensor in self.model.state_dict().items()}
        for index, (parameter, state) in enumerate(self.optimizer.state.items()):
            found |= {f"{index}.{tuple(parameter.shape)}.{key}": raw(value) for key, value in state.items()}
        found["lr"] = repr([group["lr"] for group in self.optimizer.param_groups]).encode()
        found["scale"] = repr(self.scaler.state_dict()).encode()
        found["next"] = repr((random.random(), np.random.rand(), torch.rand(3).tolist())).encode()
        return found

    def whole(self) -> dict[str, bytes]:
        """Every bit of parameters and optimizer states, by name, however they are sharded; a collective."""
        found = {}
        for name, parameter in self.model.named_parameters():
            states = {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
            for path, tensor in ((name, parameter), *states.items()):
                found[path] = raw(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)
        return found


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, or of this rank's part of it."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
