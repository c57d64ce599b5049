"""DeepSpeed engines go on from a snapshot to the last bit."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stowplan.core.errors import InvalidArgument, SnapshotMismatch
from stowplan.runtime.snapshot.disk.copies import copy_path, finish, write_part
from stowplan.runtime.snapshot.disk.restore import restore_from_disk
from stowplan.runtime.snapshot.state.contents import Piece
from stowplan.runtime.snapshot.state.restore import restore
from stowplan.runtime.snapshot.state.state_schema import dump_schema
from stowplan.runtime.snapshot.state.training_state import TrainingState, flatten
from tests.distributed import Ranks

pytestmark = [
    pytest.mark.slow,  # processes of their own
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

SNAPSHOT_AT, NUM_STEPS = 3, 6


@pytest.fixture(scope="module")
def engine_ranks() -> Iterator[Ranks]:
    """Two ranks of their own, as DeepSpeed changes the environment."""
    group = Ranks(2)
    yield group
    group.stop()


def started(rank: int) -> Any:
    """DeepSpeed on the CPU, which compiles nothing then."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().is_fp16_supported = lambda: True  # torch computes with it, if slowly, where DeepSpeed would not
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


class Warmth(torch.nn.Module):
    """A buffer that counts, and has its say."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * torch.tanh(self.calls).to(x.dtype)


class Training:
    """An engine that draws random numbers, with dropout; ``persistent``: ZeRO-3 keeps small parameters gathered."""

    def __init__(self, rank: int, stage: int, dtype: str = "float32", persistent: int = 0, every: int = 1) -> None:
        deepspeed = started(rank)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), Warmth(), torch.nn.Dropout(0.2), torch.nn.Linear(16, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": every,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": persistent},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if dtype != "float32":
            config["fp16" if dtype == "float16" else "bf16"] = {"enabled": True}
        self.dtype = getattr(torch, dtype)
        self.engine, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=config,
            lr_scheduler=lambda base: torch.optim.lr_scheduler.CosineAnnealingLR(base, NUM_STEPS),
        )
        torch.manual_seed(100 + rank)
        self.rows = torch.Generator().manual_seed(rank)
        self.step = 0

    def state(self) -> TrainingState:
        return TrainingState(model=self.engine, optimizer=self.optimizer, extras={"rows": self.rows}, step=self.step)

    def run(self, until: int) -> list[str]:
        losses = []
        while self.step < until:
            x = torch.randn(4, 8, generator=self.rows).to(self.dtype)
            loss = (self.engine(x).float() - 1).square().mean()
            self.engine.backward(loss)
            self.engine.step()
            self.step += 1
            losses.append(loss.item().hex())
        return losses

    def fingerprint(self) -> list[bytes]:
        """Every bit of this rank's parameters, fp32 partitions, optimizer states and options."""
        zero = self.optimizer
        masters = zero.fp32_partitioned_groups_flat if hasattr(zero, "fp32_partitioned_groups_flat") else None
        masters = masters or getattr(zero, "single_partition_of_fp32_groups", None) or list(zero.state)
        base = getattr(zero, "optimizer", zero)
        tensors = [getattr(p, "ds_tensor", p) for p in self.engine.module.parameters()]
        tensors += [*self.engine.module.buffers(), *masters]
        tensors += [value for master in masters for value in base.state[master].values()]
        found = [t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]
        counted = (self.engine.global_steps, self.engine.micro_steps, self.engine.skipped_steps, self.engine.get_lr())
        return [*found, repr(counted).encode()]


def taken(training: Training) -> Piece:
    flat = flatten(training.state())
    buffer = bytearray(flat.num_bytes)
    flat.copy_into(buffer)
    return Piece(dump_schema(flat.schema).decode(), buffer)


def interrupted(rank: int, stage: int, dtype: str, persistent: int) -> bool:
    first = Training(rank, stage, dtype, persistent)
    first.run(SNAPSHOT_AT)
    piece = taken(first)
    expected = first.run(NUM_STEPS), first.fingerprint()
    second = Training(rank, stage, dtype, persistent)
    second.run(1)  # whatever it has is overwritten
    second.step = restore(piece.schema, piece.buffer, second.state()).step
    return (second.run(NUM_STEPS), second.fingerprint()) == expected


CASES = [
    (0, "float32", 0),
    (1, "float32", 0),
    (1, "float16", 0),
    (2, "bfloat16", 0),
    (3, "float32", 0),
    (3, "bfloat16", 100),
]


@pytest.mark.parametrize(("stage", "dtype", "persistent"), CASES)
def test_an_engine_goes_on_to_the_last_bit(engine_ranks: Ranks, stage: int, dtype: str, persistent: int) -> None:
    assert engine_ranks.run(interrupted, stage, dtype, persistent) == [True, True]


def from_disk(rank: int, path: str, stage: int) -> bool:
    first = Training(rank, stage)
    first.run(SNAPSHOT_AT)
    write_part(path, taken(first))
    expected = first.run(NUM_STEPS), first.fingerprint()
    torch.distributed.barrier()
    if rank == 0:
        assert finish(path, SNAPSHOT_AT, 2) is not None
    torch.distributed.barrier()
    second = Training(rank, stage)
    second.step = restore_from_disk(copy_path(path, SNAPSHOT_AT), second.state()).step
    return (second.run(NUM_STEPS), second.fingerprint()) == expected


@pytest.mark.parametrize("stage", [2, 3])
def test_each_rank_has_its_own_partition_on_disk(engine_ranks: Ranks, tmp_path: Path, stage: int) -> None:
    assert engine_ranks.run(from_disk, str(tmp_path), stage) == [True, True]


def refused(rank: int) -> list[str]:
    said = []
    first = Training(rank, 1, every=2)
    first.run(1)
    with pytest.raises(InvalidArgument, match="accumulated 1 of 2 micro-batches") as caught:
        taken(first)
    said.append(str(caught.value))
    first.run(2)
    piece = taken(first)
    with pytest.raises(SnapshotMismatch, match="was of ZeRO-1, and is of ZeRO-2 here"):
        restore(piece.schema, piece.buffer, Training(rank, 2).state())
    engine = Training(rank, 0).engine
    with pytest.raises(InvalidArgument, match="pass its optimizer, too"):
        flatten(TrainingState(model=engine))
    return said


def test_what_engines_cannot_do_is_refused(engine_ranks: Ranks) -> None:
    assert len(engine_ranks.run(refused)) == 2
