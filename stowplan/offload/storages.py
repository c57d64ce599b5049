"""Storages behind tensors: their sizes, each once, and their bytes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from stowplan.offload.parallel import local_part

__all__ = ["content_of", "modified_in_place", "storage_bytes"]


def content_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's whole storage as bytes; shares its memory."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def modified_in_place(tensor: torch.Tensor, version: int) -> RuntimeError:
    """The error that autograd itself raises where no hooks are in its way."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"{tensor.dtype} {tuple(tensor.shape)} is at version {tensor._version}; expected version {version} instead"
    )


def storage_bytes(tensors: Iterable[object]) -> int:
    """Bytes of the storages behind ``tensors``, each once; what is no tensor counts nothing, and of a distributed
    tensor this process's part does.
    """
    storages = (tensor.untyped_storage() for tensor in map(local_part, tensors) if isinstance(tensor, torch.Tensor))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
