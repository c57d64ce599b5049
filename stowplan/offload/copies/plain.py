"""Copies on the current stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stowplan.offload.copies.protocol import HostCopy, Passage, Portion, Stop
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.storages import content_of

__all__ = ["PlainCopies"]


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
        sent = []
        for portion in portions:
            content = content_of(portion.tensor)
            num_bytes = content.numel()
            end = num_bytes if portion.stop is None else portion.stop
            copy = HostCopy(portion, num_bytes, end, self._release)
            copy.span = slab.take(end - portion.start)
            slab.view(copy.span).copy_(content if end - portion.start == num_bytes else content[portion.start : end])
            sent.append(copy)
        return sent

    def fetch(self, stop: Stop, copies: Sequence[HostCopy]) -> int:
        travelling = 0
        for copy in copies:
            if copy.content is not None:
                continue
            assert copy.span is not None
            content = torch.empty(copy.num_bytes, dtype=torch.uint8, device=copy.device)
            size = copy.stop - copy.start
            (content if size == copy.num_bytes else content[copy.start : copy.stop]).copy_(self.slab.view(copy.span))
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
