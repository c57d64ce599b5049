"""Tensors one after the other, as they lie in a snapshot's bytes; referred to, never copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from stowplan.runtime.snapshot.state.leaf import ALIGNMENT, Share

__all__ = ["Division", "Payload", "Portion", "Storage"]


class Storage(NamedTuple):
    """What makes two tensors the same bytes."""

    device: torch.device
    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Storage:
        """Of a plain tensor with elements."""
        return cls(tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


class Portion(NamedTuple):
    """What a snapshot has of a replicated tensor: ``length`` of the share's dimension; ``owned`` as of leaves.

    ``copied``: whether other nodes' snapshots have copies of it, taken from their own replicas.
    """

    share: Share
    length: int
    owned: bool
    copied: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """That part of it."""
        return tensor.narrow(self.share.dim, self.share.begin, self.length)


class Payload:
    """Tensors one after the other, each at a multiple of 64 bytes; what shares memory shares its bytes."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.offsets: list[int] = []
        self.num_bytes = 0
        self._places: dict[Storage, int] = {}

    def place(self, tensor: torch.Tensor) -> int:
        """Where it begins; 0 for what has no bytes."""
        if not tensor.numel():
            return 0
        memory = Storage.of(tensor)
        if memory not in self._places:
            self._places[memory] = self.num_bytes
            self.tensors.append(tensor)
            self.offsets.append(self.num_bytes)
            self.num_bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return self._places[memory]


@dataclass(frozen=True, slots=True)
class Division:
    """What a rank's snapshot has of what is replicated.

    Attributes:
        portions: by the paths of tensors.
        shares: those portions of which other nodes have copies, and then the copies that this one has of others'; the
            bytes of a share and of its copies are the same, gaps included. Empty where there are no copies.
    """

    portions: dict[str, Portion]
    shares: tuple[Payload, ...] = ()
