"""Bytes of tensors, each storage once."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["storage_bytes"]


def storage_bytes(tensors: Iterable[object]) -> int:
    """Bytes of the storages behind ``tensors``, each once; what is no tensor counts nothing."""
    storages = (tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
