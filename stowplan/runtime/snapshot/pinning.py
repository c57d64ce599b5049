"""Page-locking the memory that snapshots are copied into, so that a GPU copies at the speed of its link."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from stowplan.offload.host_slab import page_lock

__all__ = ["page_locked"]


def page_locked(memory: memoryview) -> Callable[[], object]:
    """Page-lock it where this process uses CUDA; gives what undoes that. Warns where CUDA refuses."""
    if not torch.cuda.is_initialized():
        return _nothing
    try:
        return page_lock(torch.frombuffer(memory, dtype=torch.uint8).data_ptr(), memory.nbytes)
    except RuntimeError as error:
        warnings.warn(f"snapshots are copied through pageable memory, which is slower: {error}", RuntimeWarning, 2)
        return _nothing


def _nothing() -> None:
    pass
