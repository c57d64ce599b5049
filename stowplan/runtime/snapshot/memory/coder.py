"""What brings snapshots from LOCAL to GLOBAL, and the coder of a job that has no other nodes to code with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from stowplan.runtime.snapshot.memory.slots import Snapshot, State, every

if TYPE_CHECKING:
    from stowplan.runtime.snapshot.memory.store import Store

__all__ = ["Alone", "Coder"]


class Coder(Protocol):
    """What brings snapshots from LOCAL to GLOBAL: parity, and the barriers of a group."""

    def code(self, store: Store, rank: int, snapshot: Snapshot) -> None:
        """Called in the rank's own worker thread when its slot is LOCAL; again after adoption and roll back.

        It may be PARITY then, or GLOBAL. May wait for others. Uses ``store.data``, ``store.parity``,
        ``store.commit_parity`` and ``store.commit_global``, which raise SnapshotRefused once it was given up.
        """


class Alone:
    """The coder of a job on one node: no parity, and both barriers are between the ranks of this node."""

    def code(self, store: Store, rank: int, snapshot: Snapshot) -> None:
        """GLOBAL, once all ranks are LOCAL; the last of them finds that out."""
        with store.exclusive():
            for state, commit in ((State.PARITY, store.commit_parity), (State.GLOBAL, store.commit_global)):
                members = store.members()
                if len(members) < store.num_ranks:
                    return
                if not every(list(members.values()), snapshot, State(state - 1)):
                    return
                for other, slots in members.items():
                    if slots.state(snapshot.sequence) < state:
                        commit(other, snapshot)
