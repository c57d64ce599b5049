"""Where a training is restored from: the memory of this or a former layout, other nodes' memory, or disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

from stowplan.core.errors import InvalidSnapshot, RankFailed, UnrecoverableSnapshot
from stowplan.runtime.snapshot.disk.copies import good_copies, step_of
from stowplan.runtime.snapshot.disk.restore import restore_from_disk
from stowplan.runtime.snapshot.fail_points import fail_at
from stowplan.runtime.snapshot.former import all_pieces, newest_first, own_piece
from stowplan.runtime.snapshot.job_memory import JobMemory
from stowplan.runtime.snapshot.layouts import Found, RankLayout
from stowplan.runtime.snapshot.place import Agreement, failed_with
from stowplan.runtime.snapshot.reservation import Reservation
from stowplan.runtime.snapshot.state.gathered import restore_shares
from stowplan.runtime.snapshot.state.restore import Restored, reshard
from stowplan.runtime.snapshot.state.training_state import TrainingState

__all__ = ["restore_newest"]

_NO_COPY = (
    "There is no copy on disk to go on from either. To begin anew, give up what is left (stowplan snapshots end --run "
    "{run}), or give another run=."
)


def restore_newest(
    agreement: Agreement, memory: JobMemory, state: Callable[[], TrainingState], directory: Path | None
) -> Restored | None:
    """Put the newest snapshot that all ranks can have into a training; None: there never was a complete one.

    All ranks call it. What is held of this layout and was not restored is given up. Raises as ``Snapshotter.restore``.
    """
    return _Restoring(agreement, memory, state, directory).newest()


class _Restoring:
    def __init__(
        self, agreement: Agreement, memory: JobMemory, state: Callable[[], TrainingState], directory: Path | None
    ) -> None:
        self._agreement, self._memory, self._state, self._directory = agreement, memory, state, directory
        self._processes = memory.processes

    def newest(self) -> Restored | None:
        found = self._agreement.together("looking for snapshots", self._processes.found)
        everything = [each for own in found for each in own]
        copies = self._agreement.together("looking for copies on disk", self._copies)[0]
        restored, own, lost = None, False, None
        for layout in newest_first(everything):
            try:
                restored, own = self._from_memory(layout, found, copies)
                break
            except UnrecoverableSnapshot as error:
                lost = lost or error
        if restored is None:
            restored = self._from_disk(copies)
        if restored is None and lost is not None and any(each.counted for each in everything):
            raise UnrecoverableSnapshot(lost.lost, lost.stands, _NO_COPY.format(run=self._processes.run))
        if not own:  # it is older, or could not be had, or never was complete
            self._memory.roll_back(0)
        return restored

    def _from_memory(
        self, layout: RankLayout, found: Sequence[Sequence[Found]], copies: Sequence[Path]
    ) -> tuple[Restored, bool]:
        """Out of a layout's memory, unless a copy on disk is newer; whether it was this layout's memory."""
        there = [each for own in found for each in own if each.layout == layout]
        sizes = max(each.data_bytes for each in there), max(each.parity_bytes for each in there)
        capacity = Reservation(*sizes).member(layout.code, 0)
        if own := layout == self._processes.layout:
            members = self._memory.members
            self._memory.reserve_exactly(capacity)
        else:
            members = self._memory.take_over(layout, found)
            members.reserve(capacity)
        sequence, step = members.recovered(str(copies[0]) if copies else "")
        if newer := list(takewhile(lambda copy: step_of(copy) > step, copies)):
            with contextlib.suppress(InvalidSnapshot):
                if restored := self._from_disk(newer):
                    return restored, False
        pieces = members.read(sequence)
        into = self._state()
        if own:
            fail_at("restore.begin")
            restored = restore_shares(self._agreement, own_piece(self._agreement, pieces[0]), into)
            fail_at("restore.end")
            return restored, True
        pieces = all_pieces(self._agreement, pieces, self._processes.place.local_size)
        return self._agreed("restoring", lambda: reshard(pieces, into)), False

    def _from_disk(self, copies: Sequence[Path]) -> Restored | None:
        """The first of them that is whole; None where there is none. Raises InvalidSnapshot where all are damaged."""
        into = self._state()
        problems = []
        for copy in copies:
            try:
                return self._agreed("restoring from disk", partial(restore_from_disk, copy, into))
            except (InvalidSnapshot, RankFailed) as error:
                if not failed_with(error, InvalidSnapshot):
                    raise
                problems.append(str(error))
        if problems:
            raise InvalidSnapshot(f"no copy in {self._directory} is whole. {' '.join(problems)}")
        return None

    def _copies(self) -> list[Path]:
        """Complete ones, the newest first; rank 0 looks."""
        if self._directory is None or self._processes.place.rank:
            return []
        return good_copies(self._directory, self._processes.run)[::-1]

    def _agreed(self, doing: str, work: Callable[[], Restored]) -> Restored:
        made: list[Restored] = []
        self._agreement.together(doing, lambda: made.append(work()))
        return made[0]
