"""Copies on the current stream."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from stowplan.offload.copies.protocol import HostCopy, Passage, Portion, Stop
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

    def send(self, stop: Stop, portions: Sequence[Portion]) -> list[HostCopy]:
        slab = self.slab
        sent = [HostCopy(portion, self._release) for portion in portions]
        spans = slab.take_all([copy.stop - copy.start for copy in sent])
        for copy, portion, span in zip(sent, portions, spans, strict=True):
            copy.span = span
            size = span.size_bytes
            if size < _FEW_BYTES and copy.device.type == "cpu":
                ctypes.memmove(slab.address(span), portion.tensor.untyped_storage().data_ptr() + copy.start, size)
            else:
                slab.view(span).copy_(content_of(portion.tensor)[copy.start : copy.stop])
        return sent

    def fetch(self, stop: Stop, copies: Sequence[HostCopy]) -> int:
        slab = self.slab
        travelling = 0
        for copy in copies:
            if copy.content is not None:
                continue
            span = copy.span
            assert span is not None
            size = copy.stop - copy.start
            content = copy.new_content()
            if size < _FEW_BYTES and copy.device.type == "cpu":
                ctypes.memmove(content.untyped_storage().data_ptr() + copy.start, slab.address(span), size)
            else:
                content_of(content)[copy.start : copy.stop].copy_(slab.view(span))
            copy.content = content
            self._release(copy)
            travelling += size
        return travelling

    def turn(self, stop: Stop) -> int:
        return 0

    def _release(self, copy: HostCopy) -> None:
        if copy.span is not None:
            self.slab.give_back(copy.span)
            copy.span = None
