"""When a slot of a snapshot may be written, and what it then is: pure logic that no network and no memory is part of.

A node (each of its local ranks, to be exact) has two slots. A snapshot goes through

    FREE → WRITING → LOCAL → (every node is LOCAL) → PARITY → (every node has PARITY) → GLOBAL

and the next one takes the other slot. Note: why nothing is lost

  - A slot is overwritten only while the other one is GLOBAL: every node then has data *and* parity of that snapshot,
    so it can be restored with up to m nodes lost. A node learns GLOBAL from a second barrier, after which nobody still
    needs the older snapshot; its own PARITY would not do, as another node may be without.
  - Parity has two buffers, as data has: parity of the newer snapshot is written while the older one is still needed.
  - Where the newer snapshot is not yet GLOBAL, the next one is skipped. All ranks skip the same ones, so they agree
    before they begin (``Slots.next_slot``).
  - The older snapshot may be kept while a copy of it on disk is being written: the next one takes the newer one's slot
    then. That one is GLOBAL, so the older one is, too, and stays what can be restored. All ranks keep the same one, of
    this generation: one from before a restart may be missing where a node was replaced.
  - A restart raises the generation on every node first, then chooses what to restore, and then discards what is newer.
    Who still has an older generation is refused, so what was chosen stays what can be restored.

The tests walk through every order of these steps, with trainers, memory processes and nodes lost at each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from stowplan.core.errors import SnapshotRefused

__all__ = ["Slot", "Slots", "Snapshot", "State", "every", "restorable"]


class State(IntEnum):
    """Of a slot; numbers of the header's format."""

    FREE = 0
    WRITING = 1  # nothing in it counts
    LOCAL = 2  # data is complete, and its checksums are in memory
    PARITY = 3  # so is this node's parity
    GLOBAL = 4  # every node has come to PARITY


@dataclass(frozen=True, slots=True, order=True)
class Snapshot:
    """Which one: the same on all ranks. ``sequence`` counts snapshots of a run from 1 and never goes back."""

    generation: int
    sequence: int
    step: int

    def __str__(self) -> str:
        return f"snapshot {self.sequence} (step {self.step}, generation {self.generation})"


@dataclass(frozen=True, slots=True)
class Slot:
    """What one slot is; a snapshot is in it unless it is FREE."""

    state: State = State.FREE
    snapshot: Snapshot | None = None

    @property
    def pending(self) -> bool:
        """Whether it is on its way to GLOBAL."""
        return State.FREE < self.state < State.GLOBAL

    @property
    def sequence(self) -> int:
        """0 where there is none."""
        return self.snapshot.sequence if self.snapshot else 0


@dataclass(frozen=True, slots=True)
class Slots:
    """The slots of one rank, and the newest generation that it has heard of. Methods give what comes next.

    All raise SnapshotRefused, "order" for steps that are not allowed now, "generation" for those of stale ranks.
    """

    slots: tuple[Slot, ...] = (Slot(), Slot())
    generation: int = 0

    def next_slot(self, kept: int = 0) -> int | None:
        """The slot that the next snapshot may take: the older one that does not have ``kept``.

        None: the next one has to be skipped, as one is pending, or ``kept`` is not GLOBAL of this generation.
        """
        if any(slot.pending for slot in self.slots) or (kept and not self._restorable_by_all(kept)):
            return None
        others = [index for index, slot in enumerate(self.slots) if not kept or slot.sequence != kept]
        return min(others, key=lambda index: self.slots[index].sequence)

    @property
    def newest(self) -> int:
        """The sequence number of the newest snapshot that is in a slot; 0 if there is none."""
        return max(slot.sequence for slot in self.slots)

    def _restorable_by_all(self, sequence: int) -> bool:
        slot = self.slots[self.find(sequence)] if self.state(sequence) else Slot()
        return slot.state is State.GLOBAL and slot.snapshot is not None and slot.snapshot.generation == self.generation

    def find(self, sequence: int) -> int:
        """The slot that this snapshot is in."""
        for index, slot in enumerate(self.slots):
            if slot.sequence == sequence and slot.state:
                return index
        held = ", ".join(f"{slot.snapshot} {slot.state.name}" for slot in self.slots if slot.snapshot)
        raise SnapshotRefused("order", f"snapshot {sequence} is in no slot; there are: {held or 'none'}.")

    def state(self, sequence: int) -> State:
        """Of this snapshot; FREE where it is in no slot."""
        return next((slot.state for slot in self.slots if slot.sequence == sequence), State.FREE)

    def fenced(self, generation: int) -> Slots:
        """``generation`` is the newest from now on; what an older one was writing will never be complete."""
        self.check(generation)
        if generation == self.generation:
            return self
        return replace(self._without(lambda slot: slot.state is State.WRITING), generation=generation)

    def check(self, generation: int) -> None:
        """Refuse a stale generation."""
        if generation < self.generation:
            raise SnapshotRefused(
                "generation",
                f"generation {generation} is stale: the job was restarted and is at generation {self.generation}. This "
                f"process belongs to what was before; end it.",
            )

    def begun(self, snapshot: Snapshot, kept: int = 0) -> tuple[Slots, int]:
        """``snapshot`` is WRITING in the slot whose number comes with it; what was there is given up, not ``kept``."""
        if snapshot.generation != self.generation:
            self.check(snapshot.generation)
            raise SnapshotRefused("generation", f"{snapshot} is of no generation known here: {self.generation} is.")
        if snapshot.sequence <= self.newest:
            raise SnapshotRefused(
                "order", f"{snapshot} is not new: {self.newest} is in memory already. Take the next number."
            )
        index = self.next_slot(kept)
        if index is None:
            waits = next((slot for slot in self.slots if slot.pending), None)
            why = (
                f"{waits.snapshot} is {waits.state.name}"
                if waits
                else f"snapshot {kept}, to be kept, is not GLOBAL now"
            )
            raise SnapshotRefused("order", f"{why}: skip {snapshot}, or wait.")
        return self._with(index, Slot(State.WRITING, snapshot)), index

    def advanced(self, sequence: int, state: State) -> Slots:
        """The snapshot comes to ``state``, the next after its own. Barriers are the caller's: ``every``."""
        index = self.find(sequence)
        slot = self.slots[index]
        if state != slot.state + 1:
            raise SnapshotRefused("order", f"{slot.snapshot} is {slot.state.name} and cannot become {state.name} now.")
        return self._with(index, Slot(state, slot.snapshot))

    def abandoned(self, sequence: int, *, by_all: bool = False) -> Slots:
        """The snapshot is given up: some rank does not have it. Not from PARITY on, when others may count on it.

        ``by_all``: PARITY may be given up, too, as another member gave up before it had PARITY: nobody comes to GLOBAL.
        """
        index = self.find(sequence)
        slot = self.slots[index]
        if slot.state > (State.PARITY if by_all else State.LOCAL):
            raise SnapshotRefused(
                "order", f"{slot.snapshot} is {slot.state.name}: others may count on it. Restart the job to go back."
            )
        return self._with(index, Slot())

    def rolled_back(self, sequence: int) -> Slots:
        """All that is newer than what the job restores is given up; 0 gives up everything."""
        return self._without(lambda slot: slot.sequence > sequence)

    def rebuilding(self, snapshot: Snapshot) -> tuple[Slots, int]:
        """A lost snapshot is being computed from other nodes' into the slot whose number comes with it.

        That is one that is FREE or was being written, has the same or a newer snapshot, or else the older one.
        """

        def worth(index: int) -> int:
            slot = self.slots[index]
            unfinished = slot.state <= State.WRITING
            return 0 if unfinished or slot.snapshot is None or slot.snapshot >= snapshot else slot.sequence

        index = min(range(len(self.slots)), key=worth)
        return self._with(index, Slot(State.WRITING, snapshot)), index

    def survived(self) -> Slots:
        """After the memory process was lost: what was being written will never be complete, all else is as it was."""
        return self._without(lambda slot: slot.state is State.WRITING)

    def _with(self, index: int, slot: Slot) -> Slots:
        return replace(self, slots=(*self.slots[:index], slot, *self.slots[index + 1 :]))

    def _without(self, condition: Callable[[Slot], bool]) -> Slots:
        return replace(self, slots=tuple(Slot() if condition(slot) else slot for slot in self.slots))


def every(members: Sequence[Slots], snapshot: Snapshot, state: State) -> bool:
    """A barrier: whether all have come to ``state`` with this very snapshot, and to the same generation."""
    return all(
        member.generation == members[0].generation
        and any(slot.snapshot == snapshot and slot.state >= state for slot in member.slots)
        for member in members
    )


def restorable(survivors: Sequence[Slots], num_lost: int = 0, most_lost: int = 0) -> Snapshot | None:
    """The newest snapshot that can be restored; None where there is none.

    All survivors need its data, and where any member of the group is lost (``num_lost``, at most ``most_lost``, the
    code's m) their parity too. Ask when all have come to the new generation.
    """
    if num_lost > most_lost or not survivors:
        return None
    least = State.PARITY if num_lost else State.LOCAL
    held = {slot.snapshot for slot in survivors[0].slots if slot.snapshot and slot.state >= least}
    return max((snapshot for snapshot in held if every(survivors, snapshot, least)), default=None)
