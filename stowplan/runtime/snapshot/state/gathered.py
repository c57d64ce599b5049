"""Pieces of all ranks brought together, and a training restored that has parts of its state in others' snapshots."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from stowplan.core.units import MIB
from stowplan.runtime.snapshot.place import Agreement
from stowplan.runtime.snapshot.state.contents import Contents, Piece
from stowplan.runtime.snapshot.state.restore import Restored, restore
from stowplan.runtime.snapshot.state.training_state import TrainingState, as_bytes

__all__ = ["gather_pieces", "restore_shares"]

_MESSAGE_BYTES = 32 * MIB


def restore_shares(agreement: Agreement, own: Piece, into: TrainingState) -> Restored:
    """``restore``, for all ranks at once: what is replicated is fetched from those that have the rest of it.

    Raises:
        InvalidSnapshot, SnapshotMismatch: as ``restore`` does.
    """
    words = agreement.together("reading snapshots", lambda: _families(own))
    others: list[Piece] = []
    if any(words):
        wanted = {rank for rank, word in enumerate(words) if rank != agreement.rank and word & words[agreement.rank]}
        others = gather_pieces(agreement, own, wanted)
    made: list[Restored] = []
    agreement.together("restoring", lambda: made.append(restore(own.schema, own.buffer, into, others)))
    return made[0]


def _families(piece: Piece) -> set[int]:
    return {leaf.share.family for leaf in Contents.of(piece).shared_leaves().values() if leaf.share}


def gather_pieces(agreement: Agreement, own: Piece | None, wanted: Collection[int] | None = None) -> list[Piece]:
    """The pieces of all ranks that have one, by rank; all ranks call it, from which to which they are sent directly.

    Args:
        agreement: of all ranks.
        own: this rank's piece; None: it has none.
        wanted: the ranks whose pieces this one asks for. Default: all.

    Returns:
        What was asked for, in memory of this process but for its own, which is as it was given.
    """
    content = as_bytes(own.buffer) if own else torch.empty(0, dtype=torch.uint8)
    sizes = agreement.gather((own.schema if own else None, content.numel(), wanted))
    rank, world_size = agreement.rank, agreement.world_size
    pieces = {rank: own} if own and _asks(wanted, rank) else {}
    for distance in range(1, world_size):
        to, source = (rank + distance) % world_size, (rank - distance) % world_size
        incoming = outgoing = torch.empty(0, dtype=torch.uint8)
        if _asks(sizes[to][2], rank):
            outgoing = content
        their_schema, num_bytes, _ = sizes[source]
        if their_schema is not None and _asks(wanted, source):
            room = np.empty(num_bytes, np.uint8)
            incoming = as_bytes(room)
            pieces[source] = Piece(their_schema, room)
        for begin in range(0, max(incoming.numel(), outgoing.numel()), _MESSAGE_BYTES):
            end = begin + _MESSAGE_BYTES
            agreement.swap(to, outgoing[begin:end], source, incoming[begin:end])
    return [pieces[each] for each in sorted(pieces)]


def _asks(wanted: Collection[int] | None, rank: int) -> bool:
    return wanted is None or rank in wanted
