"""The stream that a device's kernels are queued on now."""

from __future__ import annotations

import torch

__all__ = ["current_stream"]


def current_stream(device: torch.device) -> int:
    """A number for the current stream of ``device``; 0 where there are no streams, or the device is pretended."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.current_stream(device).cuda_stream)
