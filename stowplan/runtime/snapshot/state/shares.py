"""What is replicated is divided: each rank's snapshot has a share, and all shares together make it whole.

Every rank works out the same division from tensors' order, shapes and types. Rows of a dimension are dealt as evenly as
they can be; what is small goes to one rank or to few, in turn, so that no part is smaller than a page.

Where all nodes have replicas, a rank's snapshot also has copies of the shares of the m nodes before its own, out of its
own replicas: so any m nodes may be lost, and no byte of a share is sent to another node for that.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence

import torch

from stowplan.runtime.snapshot.place import Agreement, CodeGroup
from stowplan.runtime.snapshot.state.leaf import Share
from stowplan.runtime.snapshot.state.payload import Division, Payload, Portion, Storage
from stowplan.runtime.snapshot.state.replicas import Ranks, Replica, same_replicas
from stowplan.runtime.snapshot.state.training_state import TrainingState

__all__ = ["agreed_division", "divided", "portions"]

_LEAST_PART_BYTES = 4096
_ENOUGH_ROWS = 16  # of a part: one more or less makes little difference


def agreed_division(agreement: Agreement, state: TrainingState, group: CodeGroup | None = None) -> Division | None:
    """For ``flatten``, this rank's; ``group``: who holds copies of whose shares, if anybody does. All ranks call it.

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
    return divided(same.replicas, agreement.rank, same.elsewhere, group)


def divided(
    replicas: Sequence[Replica], rank: int, elsewhere: Collection[str] = (), group: CodeGroup | None = None
) -> Division:
    """That of ``rank``, which has all ``replicas``; ``elsewhere`` are paths of what others write to disk."""
    families: dict[Ranks, list[Replica]] = {}
    for replica in replicas:
        families.setdefault(replica.ranks, []).append(replica)
    found: dict[str, Portion] = {}
    shares: list[Payload] = []
    for ranks in sorted(families):  # in one order on all nodes: a family's own is
        copied = group is not None and group.within(ranks)
        for replica, portion in portions(families[ranks], rank):
            found[replica.path] = portion._replace(owned=replica.path not in elsewhere, copied=copied)
        if group and copied:
            shares = shares or [Payload() for _ in group.owners]
            for payload, owner in zip(shares, group.owners, strict=True):
                for replica, portion in portions(families[ranks], owner):
                    payload.place(portion.of(replica.tensor))
    return Division(found, tuple(shares))


def portions(family: Sequence[Replica], rank: int) -> Iterator[tuple[Replica, Portion]]:
    """What ``rank`` has of each; all have the same ranks, and it is one of them."""
    ranks = family[0].ranks
    index, lowest = ranks.index(rank), min(ranks)
    turns = {True: 0, False: 0}  # of what goes to all, and of what goes to some
    known: dict[Storage, Portion] = {}
    for replica in family:
        memory = Storage.of(replica.tensor)
        if memory not in known:
            size = replica.tensor.shape
            dim, num_parts = _division(replica.tensor, len(ranks))
            to_all = num_parts == len(ranks)
            part = (index - turns[to_all]) % len(ranks)
            begin, length = _part(size[dim], num_parts, part)
            known[memory] = Portion(Share(dim, begin, size[dim], lowest), length, True)
            # Who has more than others this time has not the next time.
            turns[to_all] += size[dim] % num_parts if to_all else num_parts
        yield replica, known[memory]


def _division(tensor: torch.Tensor, num_ranks: int) -> tuple[int, int]:
    """The dimension to divide, and into how many parts."""
    wanted = min(num_ranks, -(-tensor.nbytes // _LEAST_PART_BYTES))
    shape = tuple(tensor.shape)
    long = [dim for dim, size in enumerate(shape) if size >= _ENOUGH_ROWS * wanted]
    dim = long[0] if long else shape.index(max(shape))
    return dim, min(wanted, shape[dim])


def _part(size: int, num_parts: int, part: int) -> tuple[int, int]:
    """Where a part begins, and how long it is."""
    rows, more = divmod(size, num_parts)
    begin = min(part * rows + min(part, more), size)
    return begin, rows + (part < more) if part < num_parts else 0
