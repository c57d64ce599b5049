"""A saved value whose rows do different things, between forward and backward."""

from __future__ import annotations

import torch

from stowplan.offload.copies.protocol import HostCopy
from stowplan.offload.storages import content_of
from stowplan.offload.tape.replay import view_of
from stowplan.offload.tape.tape import Geometry

__all__ = ["Parted"]


class Parted:
    """The kept rows of a value, and the host's copy of others; its first rows may be nowhere.

    ``tensor`` joins what there is in one buffer of the whole size, in which a replay makes the first rows.
    """

    __slots__ = ("_device", "_kept", "_num_bytes", "_whole", "copy", "geometry")

    def __init__(self, tensor: torch.Tensor, kept: slice, geometry: Geometry, copy: HostCopy | None) -> None:
        content = content_of(tensor)
        self.copy = copy
        self._device = tensor.device
        self.geometry = geometry  # of the value, not of how ``tensor`` sees it
        self._num_bytes = content.numel()
        self._kept: torch.Tensor | None = content[kept].clone()
        self._whole: torch.Tensor | None = None

    @property
    def complete(self) -> bool:
        """Are all rows there, because the value had not left the device when it was wanted?"""
        return self.copy is not None and self.copy.complete

    @property
    def tensor(self) -> torch.Tensor:
        """The value on the device, joined at the first call; its copy must have been fetched."""
        if self._whole is None:
            if self.copy is not None:
                content = content_of(self.copy.tensor)
            else:
                content = torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device)
            if not self.complete:
                assert self._kept is not None
                content[self._num_bytes - self._kept.numel() :].copy_(self._kept)
            self._kept = None
            self._whole = view_of(content, self.geometry)
        return self._whole
