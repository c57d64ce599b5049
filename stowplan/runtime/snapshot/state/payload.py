"""Tensors one after the other, as they lie in a snapshot's bytes; referred to, never copied."""

from __future__ import annotations

from typing import NamedTuple

import torch

from stowplan.runtime.snapshot.state.leaf import ALIGNMENT, Share

__all__ = ["Payload", "Portion", "Storage"]


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
    """What a snapshot has of a replicated tensor: ``length`` of the share's dimension; ``owned`` as of leaves."""

    share: Share
    length: int
    owned: bool

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
