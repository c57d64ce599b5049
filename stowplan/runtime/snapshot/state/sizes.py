"""How many bytes a snapshot has, and, before training has begun, will have.

Optimizer states that are not there yet, and fake tensors, are counted as what they will be.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from stowplan.core.errors import InvalidArgument
from stowplan.offload.capture.optimizers import steady_states
from stowplan.offload.parallel import like_distributed
from stowplan.runtime.snapshot.codes import Code
from stowplan.runtime.snapshot.memory.layout import payload_offset
from stowplan.runtime.snapshot.memory.schema import Schema, Tensor, schema_to_bytes
from stowplan.runtime.snapshot.place import CodeGroup
from stowplan.runtime.snapshot.reservation import Reservation, SlotBytes, SnapshotMemory
from stowplan.runtime.snapshot.state.leaf import Leaf
from stowplan.runtime.snapshot.state.modules import models_of, named
from stowplan.runtime.snapshot.state.replicas import replicas_of
from stowplan.runtime.snapshot.state.state_schema import Encoder, dump_schema
from stowplan.runtime.snapshot.state.training_state import Flat, OptimizerStates, TrainingState, flatten

__all__ = ["described", "expected_bytes", "predicted"]

_SHARE_NODE_BYTES = 80  # of the schema, at most, for what a share is a part of


def described(flat: Flat) -> tuple[str, Schema, SlotBytes]:
    """The state's own schema as text, the slot's with it, and what the slot has to hold for all of it."""
    text, num_bytes = dump_schema(flat.schema).decode(), flat.schema["bytes"]
    parts = ("state", 0, num_bytes), ("copies", num_bytes, flat.num_bytes - num_bytes)
    tensors = tuple(Tensor(name, "uint8", (size,), begin, size) for name, begin, size in parts if size)
    schema = Schema(tensors, values=text)
    data_bytes = payload_offset(len(schema_to_bytes(schema))) + flat.num_bytes
    return text, schema, SlotBytes(data_bytes, data_bytes - sum(flat.shares))


def expected_bytes(state: TrainingState, group: CodeGroup | None = None) -> SlotBytes:
    """What a slot has to hold for this rank's snapshots once all optimizers have stepped; ``group`` as of ``divided``.

    States of optimizers that cannot be foreseen are left out.
    """
    states: dict[torch.Tensor, Any] = {}
    for optimizer in named(state.optimizer, "optimizer").values():
        device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
        with contextlib.suppress(InvalidArgument):
            states |= steady_states(optimizer, device)
    with _disable_current_modes():
        return _needed(state, states, group)


def predicted(
    memory: SnapshotMemory, model: Any, optimizer: Any = None, states: OptimizerStates | None = None
) -> Reservation:
    """What ``Snapshotter`` will reserve for this rank; ``states`` are those that the optimizer will have, by parameter.

    Where parameters are distributed all ranks that have them call it, as the largest counts for all.

    Raises InvalidArgument: something that a snapshot cannot hold.
    """
    with _disable_current_modes():
        needed = _needed(TrainingState(model=model, optimizer=optimizer), states, _expected_group(memory.erasure_code))
        sizes = (_largest(size + memory.beside_bytes, model) for size in (needed.data_bytes, needed.coded_bytes))
        needed = SlotBytes(*sizes)
    return Reservation.of(needed.with_reserve, memory.erasure_code)


def _expected_group(code: Code | None) -> CodeGroup | None:
    """Where launchers give each node as many ranks, one node after the other."""
    if code is None or not dist.is_available() or not dist.is_initialized():
        return None
    local_size, rest = divmod(dist.get_world_size(), code.n)
    if rest:
        return None
    index, local_rank = divmod(dist.get_rank(), local_size)
    return CodeGroup(tuple(node * local_size + local_rank for node in range(code.n)), index, code.m)


def _needed(state: TrainingState, states: OptimizerStates | None, group: CodeGroup | None) -> SlotBytes:
    """Of this rank; of what is replicated an even share, as it is divided when its bytes are known, and its copies."""
    needed = described(flatten(state, encoder=Sizes(), optimizer_states=states))[2]
    data_bytes = coded_bytes = needed.data_bytes
    for replica in {_memory_of(replica.tensor): replica for replica in replicas_of(state, states)}.values():
        size, num_ranks = replica.tensor.nbytes, len(replica.ranks)
        share = size - size * (num_ranks - 1) // num_ranks
        copied = group is not None and group.within(replica.ranks)
        coded_bytes += _SHARE_NODE_BYTES - (size if copied else size - share)
        data_bytes += _SHARE_NODE_BYTES - size + (share * len(group.owners) if group and copied else share)
    return SlotBytes(data_bytes, coded_bytes)


class Sizes(Encoder):
    """An encoder for what takes no memory, too: it gives the schema and the number of bytes, and nothing to copy."""

    def __init__(self) -> None:
        super().__init__()
        self._stand_ins: dict[tuple[Any, ...], torch.Tensor] = {}

    def leaf(self, tensor: torch.Tensor, path: str) -> Leaf:
        """As of any tensor; that it is not this rank's to write takes a byte more, and so do all ranks count it."""
        if isinstance(tensor, DTensor) and _is_empty(tensor._local_tensor):
            tensor = like_distributed(self._stand_in(tensor._local_tensor), tensor)
        elif _is_empty(tensor):
            tensor = self._stand_in(tensor)
        return replace(super().leaf(tensor, path), owned=False)

    def _stand_in(self, fake: torch.Tensor) -> torch.Tensor:
        """One number that looks like all of the tensor; the same for what shares memory."""
        key = _memory_of(fake)
        if key not in self._stand_ins:
            self._stand_ins[key] = torch.empty((), dtype=fake.dtype).expand(fake.shape)
        return self._stand_ins[key]


def _memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What makes two tensors the same bytes, also where there are none."""
    place = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return (*place, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _is_empty(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _largest(num_bytes: int, model: Any) -> int:
    """The most that any process needs that has parts of the same parameters."""
    meshes = {tensor.device_mesh: tensor for tensor in models_of(model).tensors.values() if isinstance(tensor, DTensor)}
    for mesh in meshes:
        for group in mesh.get_all_groups():
            number = torch.tensor(num_bytes, device=mesh.device_type)
            dist.all_reduce(number, dist.ReduceOp.MAX, group)
            num_bytes = int(number)
    return num_bytes
