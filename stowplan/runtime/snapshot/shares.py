"""What is replicated is divided: each rank's snapshot has a share, and all shares together make it whole.

Every rank works out the same division from tensors' order, shapes and types. Rows of a dimension are dealt as evenly as
they can be; what is small goes to one rank or to few, in turn, so that no part is smaller than a page.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch

from stowplan.runtime.snapshot.leaf import Share
from stowplan.runtime.snapshot.place import Agreement
from stowplan.runtime.snapshot.replicas import Ranks, Replica, same_replicas
from stowplan.runtime.snapshot.state import TrainingState
from stowplan.runtime.snapshot.state_schema import Portion, Storage

__all__ = ["agreed_portions", "portions"]

_LEAST_PART_BYTES = 4096


def agreed_portions(agreement: Agreement, state: TrainingState) -> dict[str, Portion]:
    """For ``flatten``: what this rank's snapshot has of replicated tensors, by path. All ranks call it.

    What should be replicated and differs between ranks is not divided: each rank's snapshot has its own of it, and a
    RuntimeWarning names it.
    """
    same = same_replicas(agreement, state)
    if same.differing:
        warnings.warn(
            f"{len(same.differing)} tensors that ranks should have the same of differ between them, the first of them "
            f"{same.differing[0]}: each rank's snapshot has its own.",
            RuntimeWarning,
            stacklevel=3,
        )
    return {
        replica.path: portion._replace(owned=replica.path not in same.elsewhere)
        for replica, portion in portions(same.replicas, agreement.rank)
    }


def portions(replicas: Iterable[Replica], rank: int) -> Iterator[tuple[Replica, Portion]]:
    """What ``rank``, one of their ranks, has of each."""
    turns: dict[Ranks, int] = {}
    known: dict[Storage, Portion] = {}
    for replica in replicas:
        memory = Storage.of(replica.tensor)
        if memory not in known:
            turn = turns.get(replica.ranks, 0)
            known[memory], turns[replica.ranks] = _dealt(replica.tensor, replica.ranks, rank, turn)
        yield replica, known[memory]


def _dealt(tensor: torch.Tensor, ranks: Ranks, rank: int, turn: int) -> tuple[Portion, int]:
    """A rank's portion, and whose turn it is next: who has more than others this time has not the next time."""
    wanted = min(len(ranks), -(-tensor.nbytes // _LEAST_PART_BYTES))
    dim = next((dim for dim, size in enumerate(tensor.shape) if size >= wanted), None)
    if dim is None:
        dim = max(range(tensor.dim()), key=lambda dim: tensor.shape[dim])
    size = tensor.shape[dim]
    num_parts = min(wanted, size)
    rows, more = divmod(size, num_parts)
    part = (ranks.index(rank) - turn) % len(ranks)
    begin = min(part * rows + min(part, more), size)
    length = rows + (part < more) if part < num_parts else 0
    advance = more if num_parts == len(ranks) else num_parts
    return Portion(Share(dim, begin, size, min(ranks)), length, True), (turn + advance) % len(ranks)
