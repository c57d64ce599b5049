"""A training back from a copy on disk, at the same or another world size."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from stowplan.core.errors import InvalidSnapshot
from stowplan.runtime.snapshot.disk.copies import COMPLETE, own_name, part_name, verify
from stowplan.runtime.snapshot.state.contents import Contents, Piece
from stowplan.runtime.snapshot.state.restore import Restored, load_tensors, reshard
from stowplan.runtime.snapshot.state.training_state import TrainingState

__all__ = ["restore_from_disk"]


def restore_from_disk(path: str | Path, into: TrainingState, *, check: bool = True) -> Restored:
    """Put a complete copy (``newest_complete``) into a training; every rank calls it.

    At the same world size everything is as it was, to the last bit; plain tensors that ranks should have the same of,
    and had not (buffers under DDP), are those of one of them. At another one it is as ``reshard`` says.

    Args:
        path: the directory of one copy.
        into: a training of the same models and optimizers.
        check: read all files first and compare their checksums.

    Raises:
        InvalidSnapshot: the copy is incomplete or damaged.
        SnapshotMismatch: it is of another training; nothing has been changed.
    """
    path = Path(path)
    if check:
        verify(path)
    pieces = []
    try:
        world_size = json.loads((path / COMPLETE).read_bytes())["world_size"]
        for rank in range(world_size):
            schema = json.loads((path / part_name(rank)).read_bytes())["schema"]
            pieces.append(Piece(schema, mmap.mmap(-1, max(1, schema["bytes"]))))  # pages that are not read take nothing
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidSnapshot(f"{path} is no complete copy: {error}. Take an older one.") from error
    reader = FileSystemReader(path)
    own: dict[str, torch.Tensor] = {}
    for contents in map(Contents.of, pieces):
        own |= {own_name(contents.rank, leaf): contents.decoder.view(leaf) for leaf in contents.own_leaves()}
    load_tensors(own, reader)
    return reshard(pieces, into, reader)
