"""Sending tensors, or bytes of them, without a block around them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from stowplan.offload.copies import CopyEngine, Freight, HostCopy, Manifest, Stop
from stowplan.offload.tape.tape import Geometry

__all__ = ["Portion", "portion_of", "send"]


class Portion(NamedTuple):
    """What leaves, and what is known of it."""

    tensor: torch.Tensor
    freight: Freight


def portion_of(tensor: torch.Tensor, start: int = 0, stop: int | None = None) -> Portion:
    """Bytes [``start``, ``stop``) of a tensor's storage; by default all of them."""
    return Portion(tensor, Freight(Geometry.of(tensor), tensor.untyped_storage().nbytes(), start, stop))


def send(copies: CopyEngine, stop: Stop, *portions: Portion) -> list[HostCopy]:
    manifest = Manifest([portion.freight for portion in portions])
    return list(copies.send(stop, manifest, [portion.tensor for portion in portions]))
