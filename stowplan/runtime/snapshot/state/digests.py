"""Short numbers for tensors' bytes, to find out whether ranks have the same: each tensor is read where it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from stowplan.runtime.snapshot.codes import crc32c

__all__ = ["digests", "sums"]

_ROW_WORDS = 4096


def digests(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """One for each plain tensor: on the CPU the CRC-32C of its bytes, elsewhere a hash of sums that its device makes.

    Tensors on different kinds of devices cannot be compared by it.
    """
    raws = [
        tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors
    ]
    added = {index: sums(raw) for index, raw in enumerate(raws) if raw.device.type != "cpu"}  # all are begun first
    return [
        hashlib.blake2b(added[index].cpu().numpy().tobytes(), digest_size=16).digest()
        if index in added
        else crc32c(raw.numpy()).to_bytes(4, "little")
        for index, raw in enumerate(raws)
    ]


def sums(raw: torch.Tensor) -> torch.Tensor:
    """Of bytes as words of 64 bits in rows of 32 KiB: the sum of each column and of each row, and what is left over.

    Sums are modulo 2^64, so their order does not matter. Words that change places change them, too.
    """
    if raw.data_ptr() % 8 or raw.storage_offset() % 8:
        raw = raw.clone()
    num_rows = raw.numel() // (8 * _ROW_WORDS)
    rows = raw[: num_rows * 8 * _ROW_WORDS].view(torch.int64).view(num_rows, _ROW_WORDS)
    return torch.cat([rows.sum(0), rows.sum(1), raw[num_rows * 8 * _ROW_WORDS :].long()])
