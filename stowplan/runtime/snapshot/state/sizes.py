"""How many bytes a snapshot has, and, before training has begun, will have.

Optimizer states that are not there yet, and fake tensors, are counted as what they will be.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from stowplan.core.errors import InvalidArgument
from stowplan.offload.capture.optimizers import steady_states
from stowplan.offload.parallel import like_distributed
from stowplan.runtime.snapshot.memory.layout import payload_offset
from stowplan.runtime.snapshot.memory.schema import Schema, Tensor, schema_to_bytes
from stowplan.runtime.snapshot.reservation import Reservation, SnapshotMemory, with_reserve
from stowplan.runtime.snapshot.state.leaf import Leaf
from stowplan.runtime.snapshot.state.modules import models_of, named
from stowplan.runtime.snapshot.state.replicas import replicas_of
from stowplan.runtime.snapshot.state.state_schema import Encoder, dump_schema
from stowplan.runtime.snapshot.state.training_state import Flat, OptimizerStates, TrainingState, flatten

__all__ = ["described", "expected_bytes", "predicted"]


def described(flat: Flat) -> tuple[str, Schema, int]:
    """The state's own schema as text, the slot's with it, and the bytes that the slot has to hold for all of it."""
    text = dump_schema(flat.schema).decode()
    schema = Schema((Tensor("state", "uint8", (flat.num_bytes,), 0, flat.num_bytes),), values=text)
    return text, schema, payload_offset(len(schema_to_bytes(schema))) + flat.num_bytes


def expected_bytes(state: TrainingState) -> int:
    """What a slot has to hold for this rank's snapshots once all optimizers have stepped.

    States of optimizers that cannot be foreseen are left out.
    """
    states: dict[torch.Tensor, Any] = {}
    for optimizer in named(state.optimizer, "optimizer").values():
        device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
        with contextlib.suppress(InvalidArgument):
            states |= steady_states(optimizer, device)
    with _disable_current_modes():
        return _needed(state, states)


def predicted(
    memory: SnapshotMemory, model: Any, optimizer: Any = None, states: OptimizerStates | None = None
) -> Reservation:
    """What ``Snapshotter`` will reserve for this rank; ``states`` are those that the optimizer will have, by parameter.

    Where parameters are distributed all ranks that have them call it, as the largest counts for all.

    Raises InvalidArgument: something that a snapshot cannot hold.
    """
    with _disable_current_modes():
        needed = _needed(TrainingState(model=model, optimizer=optimizer), states)
        needed = _largest(needed + memory.beside_bytes, model)
    return Reservation.of(with_reserve(needed), memory.erasure_code)


def _needed(state: TrainingState, states: OptimizerStates | None) -> int:
    """Of this rank; of what is replicated an even share, as it is divided when its bytes are known."""
    whole = described(flatten(state, encoder=Sizes(), optimizer_states=states))[2]
    replicas = {id(replica.tensor): replica for replica in replicas_of(state, states)}.values()
    return whole - sum(replica.tensor.nbytes * (len(replica.ranks) - 1) // len(replica.ranks) for replica in replicas)


class Sizes(Encoder):
    """An encoder for what takes no memory, too: it gives the schema and the number of bytes, and nothing to copy."""

    def __init__(self) -> None:
        super().__init__()
        self._stand_ins: dict[tuple[Any, ...], torch.Tensor] = {}

    def leaf(self, tensor: torch.Tensor, path: str) -> Leaf:
        """As of any tensor."""
        if isinstance(tensor, DTensor) and _is_empty(tensor._local_tensor):
            tensor = like_distributed(self._stand_in(tensor._local_tensor), tensor)
        elif _is_empty(tensor):
            tensor = self._stand_in(tensor)
        return super().leaf(tensor, path)

    def _stand_in(self, fake: torch.Tensor) -> torch.Tensor:
        """One number that looks like all of the tensor; the same for what shares memory."""
        key = (fake.untyped_storage()._cdata, fake.dtype, tuple(fake.shape), fake.stride())
        if key not in self._stand_ins:
            self._stand_ins[key] = torch.empty((), dtype=fake.dtype).expand(fake.shape)
        return self._stand_ins[key]


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
