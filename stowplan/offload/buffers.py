"""The buffers of a module at one moment, to be put back."""

from __future__ import annotations

import torch

__all__ = ["Buffers"]


class Buffers:
    """Copies of a module's buffers. ``restore`` puts contents back, and the tensors where they were replaced."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._copies = [
            (child, name, buffer, buffer.detach().clone())
            for child in module.modules()
            for name, buffer in child._buffers.items()
            if buffer is not None
        ]

    def restore(self) -> None:
        """Make the buffers what they were."""
        with torch.no_grad():
            for child, name, buffer, before in self._copies:
                child._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
