"""Snapshots of a job that ran with another layout: more or fewer nodes or ranks, or another code.

The ranks that are there now take care of the memory of those that were. Memory of nodes that are gone is computed in
stand-ins beside the memory of one that is left, and then all ranks read all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stowplan.runtime.snapshot.layouts import Found, RankLayout
from stowplan.runtime.snapshot.members import Member
from stowplan.runtime.snapshot.memory.client import SnapshotClient
from stowplan.runtime.snapshot.memory.region import check_available
from stowplan.runtime.snapshot.place import Agreement
from stowplan.runtime.snapshot.state.contents import Piece
from stowplan.runtime.snapshot.state.gathered import gather_pieces
from stowplan.runtime.snapshot.state.state_schema import load_schema

__all__ = ["all_pieces", "newest_first", "own_piece", "taken_over"]


def newest_first(found: Sequence[Found]) -> list[RankLayout]:
    """Layouts of which there are snapshots; a restart's are newer than all of those before."""
    newest: dict[RankLayout, tuple[int, int]] = {}
    for each in found:
        if each.newest is not None:
            newest[each.layout] = max(each.newest, newest.get(each.layout, each.newest))
    return sorted(newest, key=lambda layout: newest[layout], reverse=True)


def taken_over(
    layout: RankLayout,
    found: Sequence[Sequence[Found]],
    rank: int,
    node: str,
    connected: Callable[[str, int, int], SnapshotClient],
) -> dict[Member, SnapshotClient]:
    """Clients of those members of a former layout that this rank takes care of.

    Args:
        layout: the former one.
        found: what each rank has found on its node, by rank.
        rank, node: this one, and the name of its node.
        connected: makes a client, of a memory process's name, a local rank, and how many local ranks there are.
    """
    hosts: dict[int, tuple[int, str]] = {}
    for other, own in enumerate(found):
        for each in own:
            if each.layout == layout and (each.index not in hosts or each.newest is not None):
                hosts[each.index] = other, each.process
    stand_in = min(hosts.values())[0]
    for index in range(layout.num_nodes):
        hosts.setdefault(index, (stand_in, layout.process(node, index)))
    return {
        Member(index, local_rank): connected(process, local_rank, layout.local_size)
        for index, (host, process) in sorted(hosts.items())
        if host == rank
        for local_rank in range(layout.local_size)
    }


def own_piece(agreement: Agreement, piece: Piece) -> Piece:
    """That of this rank, where ranks may have others' as nodes have changed places; all ranks have one."""
    ranks = agreement.together("reading snapshots", lambda: int(load_schema(piece.schema)["rank"]))
    if ranks == list(range(agreement.world_size)):
        return piece
    holder = ranks.index(agreement.rank) if agreement.rank in ranks else agreement.rank
    (own,) = gather_pieces(agreement, piece, {holder})
    return own


def all_pieces(agreement: Agreement, pieces: Sequence[Piece], local_size: int) -> list[Piece]:
    """All ranks' pieces on every rank, which takes memory for all of them.

    Raises SnapshotMemoryUnavailable: the host of ``local_size`` ranks has not so much.
    """
    sizes = agreement.gather(sum(memoryview(piece.buffer).nbytes for piece in pieces))
    purpose = f"all ranks' snapshots, on each of this node's {local_size} ranks while they are restored,"
    agreement.together("looking for memory", lambda: check_available(sum(sizes) * local_size, purpose))
    found: list[Piece] = []
    for index in range(max(agreement.gather(len(pieces)))):
        found += gather_pieces(agreement, pieces[index] if index < len(pieces) else None)
    return found
