"""A training with DistributedDataParallel whose tensors are large enough to be divided."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stowplan.runtime.snapshot.state.payload import Division
from stowplan.runtime.snapshot.state.state_schema import dump_schema
from stowplan.runtime.snapshot.state.training_state import TrainingState, flatten
from tests.runtime.snapshot.trainings import raw

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "stateless": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
}


class Wide(nn.Module):
    """Tied ends, rows that no number of ranks divides, three dtypes, and a buffer that differs between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(131, 67)
        self.norm = nn.BatchNorm1d(67)
        self.up = nn.Linear(67, 301, dtype=torch.bfloat16)
        self.down = nn.Linear(301, 67, dtype=torch.float64)
        self.last = nn.Linear(67, 131, bias=False)
        self.last.weight = self.tokens.weight
        self.frozen = nn.Parameter(torch.randn(5, 3001), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.tokens(tokens))
        hidden = hidden + self.down(self.up(hidden.bfloat16()).double()).float()
        return self.last(hidden)


def data_parallel(model: nn.Module, group: dist.ProcessGroup | None = None) -> DistributedDataParallel:
    """Gradients are added up in the order of ranks: DistributedDataParallel's own order depends on its buckets, which
    it makes anew after its first step.
    """

    def mean(_, bucket):  # torch wants no annotations, or evaluated ones
        parts = [torch.empty_like(bucket.buffer()) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, bucket.buffer(), group=group)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(torch.stack(parts).sum(0) / len(parts))
        return done

    wrapped = DistributedDataParallel(model, process_group=group)
    wrapped.register_comm_hook(None, mean)
    return wrapped


class Replicated:
    """One rank's training; ``group`` is who has the same."""

    def __init__(
        self, optimizer: str = "adamw", *, seed: int = 0, group: dist.ProcessGroup | None = None, plain: bool = False
    ) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(seed)
        model = Wide()
        self.model: nn.Module = model if plain else data_parallel(model, group)
        self.optimizer = OPTIMIZERS[optimizer](p for p in self.model.parameters() if p.requires_grad)
        self.data = torch.Generator().manual_seed(self.rank)
        torch.manual_seed(100 + self.rank)
        self.step = 0

    def state(self) -> TrainingState:
        return TrainingState(
            model=self.model, optimizer=self.optimizer, extras={"data": self.data}, step=self.step
        )  # fmt: skip

    def run(self, until: int) -> list[str]:
        """Train; gives losses as hexadecimal numbers."""
        losses = []
        while self.step < until:
            tokens = torch.randint(0, 131, (9,), generator=self.data)
            loss = nn.functional.cross_entropy(self.model(tokens) + torch.rand(131), tokens)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            losses.append(loss.item().hex())
        return losses

    def fingerprint(self) -> dict[str, bytes]:
        """Every bit of parameters, buffers and optimizer states."""
        found = {name.removeprefix("module."): raw(tensor) for name, tensor in self.model.state_dict().items()}
        for index, state in enumerate(self.optimizer.state.values()):
            found |= {f"{index}.{key}": raw(value) for key, value in state.items() if value is not None}
        return found

    def without_buffers(self) -> dict[str, bytes]:
        """What is the same on all ranks."""
        return {name: bits for name, bits in self.fingerprint().items() if not name.startswith("norm.running")}


def piece_of(state: TrainingState, division: Division | None = None) -> tuple[bytes, bytes]:
    """Schema and bytes of a snapshot."""
    flat = flatten(state, division)
    buffer = bytearray(b"\xa5" * flat.num_bytes)
    flat.copy_into(buffer)
    return dump_schema(flat.schema), bytes(buffer)
