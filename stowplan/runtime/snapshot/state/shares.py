"""What is replicated is divided: each rank's snapshot has a share, and all shares together make it whole.

Every rank works out the same division from tensors' order, shapes and types. Rows of a dimension are dealt as evenly as
they can be; what is small goes to one rank or to few, in turn, so that no part is smaller than a page.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch

from stowplan.runtime.snapshot.place import Agreement
from stowplan.runtime.snapshot.state.leaf import Share
from stowplan.runtime.snapshot.state.payload import Portion, Storage
from stowplan.runtime.snapshot.state.replicas import Ranks, Replica, same_replicas
from stowplan.runtime.snapshot.state.training_state import TrainingState

__all__ = ["agreed_portions", "portions"]

_LEAST_PART_BYTES = 4096
_ENOUGH_ROWS = 16  # of a part: one more or less makes little difference


def agreed_portions(agreement: Agreement, state: TrainingState) -> dict[str, Portion] | None:
    """For ``flatten``: what this rank's snapshot has of replicated tensors, by path. All ranks call it.

    None where no rank of the job has anything that is replicated.

    What should be replicated and differs between ranks is not divided: each rank's snapshot has its own of it, and a
    RuntimeWarning names it.
    """
    same = same_replicas(agreement, state)
    if not same.anywhere:
        return None
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
    turns: dict[tuple[Ranks, bool], int] = {}  # of what goes to all, and of what goes to some
    known: dict[Storage, Portion] = {}
    for replica in replicas:
        memory = Storage.of(replica.tensor)
        if memory not in known:
            dim, num_parts = _division(replica.tensor, len(replica.ranks))
            key = replica.ranks, num_parts == len(replica.ranks)
            part = (replica.ranks.index(rank) - turns.get(key, 0)) % len(replica.ranks)
            known[memory] = _part(replica, dim, num_parts, part)
            # Who has more than others this time has not the next time.
            more = replica.tensor.shape[dim] % num_parts if key[1] else num_parts
            turns[key] = turns.get(key, 0) + more
        yield replica, known[memory]


def _division(tensor: torch.Tensor, num_ranks: int) -> tuple[int, int]:
    """The dimension to divide, and into how many parts."""
    wanted = min(num_ranks, -(-tensor.nbytes // _LEAST_PART_BYTES))
    shape = tuple(tensor.shape)
    long = [dim for dim, size in enumerate(shape) if size >= _ENOUGH_ROWS * wanted]
    dim = long[0] if long else shape.index(max(shape))
    return dim, min(wanted, shape[dim])


def _part(replica: Replica, dim: int, num_parts: int, part: int) -> Portion:
    size = replica.tensor.shape[dim]
    rows, more = divmod(size, num_parts)
    begin = min(part * rows + min(part, more), size)
    length = rows + (part < more) if part < num_parts else 0
    return Portion(Share(dim, begin, size, min(replica.ranks)), length, True)
