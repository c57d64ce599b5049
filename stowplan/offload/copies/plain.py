"""Copies on the current stream."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from stowplan.offload.copies.protocol import Consignment, HostCopy, Manifest, Passage, Stop
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.storages import content_of

__all__ = ["PlainCopies"]

# On the CPU, fewer bytes than this are moved by one call, more by torch's threads.
_FEW_BYTES = 1 << 18


class PlainCopies:
    """Copies on the current stream: correct by construction, hidden behind nothing."""

    window = 0

    def __init__(self, slab: HostSlab) -> None:
        self.slab = slab
        self._stop = Stop(Passage(0), 0, "", None)  # nothing depends on where values leave

    def begin(self, place: int, name: str) -> Stop:
        return self._stop

    def send(self, stop: Stop, manifest: Manifest, tensors: Sequence[torch.Tensor]) -> list[HostCopy]:
        if not tensors:
            return []
        slab, move = self.slab, ctypes.memmove
        spans, held = slab.take_all(manifest.layout)
        consignment = Consignment(held, slab.give_back)
        sent = []
        for tensor, freight, span in zip(tensors, manifest.freights, spans, strict=True):
            size = freight.size_bytes
            if size < _FEW_BYTES and tensor.is_cpu:
                source = tensor.data_ptr() if freight.dense else tensor.untyped_storage().data_ptr()
                move(span.address, source + freight.start, size)
            else:
                slab.view(span).copy_(content_of(tensor)[freight.start : freight.stop])
            sent.append(HostCopy(freight, tensor.device, span, consignment))
        return sent

    def fetch(self, stop: Stop, copies: Sequence[HostCopy]) -> int:
        slab, move = self.slab, ctypes.memmove
        travelling = 0
        for copy in copies:
            if copy.content is not None:
                continue
            freight = copy.freight
            size = freight.size_bytes
            content = freight.new_content(copy.device)
            if size < _FEW_BYTES and content.is_cpu:
                move(content.data_ptr() + freight.start, copy.span.address, size)
            else:
                content_of(content)[freight.start : freight.stop].copy_(slab.view(copy.span))
            copy.content = content
            copy.consignment = None
            travelling += size
        return travelling

    def turn(self, stop: Stop) -> int:
        return 0
