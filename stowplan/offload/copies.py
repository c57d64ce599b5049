"""Moving values between the device and the host slab."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from stowplan.offload.host_slab import HostSlab, Span
from stowplan.offload.storages import content_of
from stowplan.offload.tape.replay import view_of
from stowplan.offload.tape.tape import Geometry

__all__ = ["CopyEngine", "PlainCopies", "Ticket"]


class Ticket(NamedTuple):
    """A value on the host: where its bytes are, and what tensor to make of them."""

    span: Span
    device: torch.device
    geometry: Geometry


class CopyEngine(Protocol):
    """How swapped values travel.

    ``to_host`` copies a tensor's whole storage; after it the tensor may be dropped. ``to_device`` gives a tensor of
    the same geometry over a storage of its own; ``wait`` must come before anyone reads it. ``release`` gives the host
    bytes back. Engines with streams start copies in the first two and end them in ``wait``.
    """

    def to_host(self, tensor: torch.Tensor) -> Ticket: ...

    def to_device(self, ticket: Ticket) -> torch.Tensor: ...

    def wait(self, tensor: torch.Tensor) -> None: ...

    def release(self, ticket: Ticket) -> None: ...


class PlainCopies:
    """Copies on the current stream: correct by construction, hidden behind nothing."""

    def __init__(self, slab: HostSlab) -> None:
        self.slab = slab

    def to_host(self, tensor: torch.Tensor) -> Ticket:
        storage = content_of(tensor)
        span = self.slab.take(storage.numel())
        self.slab.view(span)[: storage.numel()].copy_(storage)
        return Ticket(span, tensor.device, Geometry.of(tensor))

    def to_device(self, ticket: Ticket) -> torch.Tensor:
        whole = torch.empty(ticket.span.size_bytes, dtype=torch.uint8, device=ticket.device)
        whole.copy_(self.slab.view(ticket.span))
        return view_of(whole, ticket.geometry)

    def wait(self, tensor: torch.Tensor) -> None:
        """Nothing to wait for: plain copies are over when they return."""

    def release(self, ticket: Ticket) -> None:
        self.slab.give_back(ticket.span)
