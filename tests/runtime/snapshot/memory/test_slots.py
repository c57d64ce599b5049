"""States of slots: what is allowed when, and that nothing is lost, in any order of steps and losses."""

from __future__ import annotations

import pytest

from stowplan.core.errors import SnapshotRefused
from stowplan.runtime.snapshot.memory.slots import Slot, Slots, Snapshot, State, every, restorable
from tests.runtime.snapshot.model import Counterexample, Rules, explore

FIRST, SECOND, THIRD = (Snapshot(0, sequence, 10 * sequence) for sequence in (1, 2, 3))


def at(slots: Slots, snapshot: Snapshot, state: State) -> Slots:
    """After ``snapshot`` has come to ``state``."""
    slots, _ = slots.begun(snapshot)
    for each in range(State.LOCAL, state + 1):
        slots = slots.advanced(snapshot.sequence, State(each))
    return slots


# ---- the model check -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("n", "m", "num_snapshots", "losses"),
    [
        (2, 1, 3, 1),
        (3, 1, 4, 0),
        (3, 1, 3, 1),
        (3, 1, 1, 2),
        (4, 2, 2, 1),
        pytest.param(3, 1, 2, 2, marks=pytest.mark.full),
        pytest.param(4, 2, 2, 2, marks=pytest.mark.full),
    ],
)
def test_no_order_of_steps_and_losses_leaves_nothing_to_restore(n, m, num_snapshots, losses):
    assert explore(n, m, Rules(), num_snapshots, losses) > num_snapshots


@pytest.mark.parametrize(("n", "m", "num_snapshots", "losses"), [(2, 1, 4, 1), (3, 1, 4, 0), (3, 1, 3, 1)])
def test_nor_does_it_where_all_keep_an_older_snapshot(n, m, num_snapshots, losses):
    assert explore(n, m, Rules(kept=1), num_snapshots, losses) > num_snapshots


@pytest.mark.parametrize(("n", "m"), [(3, 1), (4, 2)])
@pytest.mark.parametrize(
    ("rules", "losses"),
    [
        (Rules(second_barrier=False), 0),
        (Rules(num_slots=1, num_parity_buffers=1), 0),
        (Rules(num_parity_buffers=1), 0),
        (Rules(fence_first=False), 1),
    ],
    ids=["one barrier", "one slot", "one parity", "no fence"],
)
def test_each_rule_is_needed(n, m, rules, losses):
    with pytest.raises(Counterexample, match="nodes lost, survivors are"):
        explore(n, m, rules, 3, losses)


# ---- one rank ------------------------------------------------------------------------------------------------------
def test_a_snapshot_takes_the_other_slot_only_when_the_newer_one_is_global():
    slots = Slots()
    for snapshot, expected in ((FIRST, 0), (SECOND, 1), (THIRD, 0)):
        assert slots.next_slot() == expected
        slots = at(slots, snapshot, State.WRITING)
        for state in (State.LOCAL, State.PARITY, State.GLOBAL):
            assert slots.next_slot() is None
            with pytest.raises(SnapshotRefused, match="skip") as raised:
                slots.begun(Snapshot(0, 9, 90))
            assert raised.value.reason == "order"
            slots = slots.advanced(snapshot.sequence, state)
    assert [slot.snapshot for slot in slots.slots] == [THIRD, SECOND]


def test_what_is_kept_is_not_overwritten_and_has_to_be_restorable():
    slots = at(at(Slots(), FIRST, State.GLOBAL), SECOND, State.GLOBAL)
    assert slots.next_slot() == 0
    assert slots.next_slot(kept=1) == 1
    kept, _ = slots.begun(THIRD, kept=1)
    assert [slot.snapshot for slot in kept.slots] == [FIRST, THIRD]
    assert slots.fenced(1).next_slot(kept=1) is None, "from before a restart"
    given_up = slots.rolled_back(1)
    assert given_up.next_slot(kept=2) is None
    with pytest.raises(SnapshotRefused, match="snapshot 2, to be kept, is not GLOBAL now: skip"):
        given_up.begun(THIRD, kept=2)


@pytest.mark.parametrize("state", [State.FREE, State.WRITING, State.PARITY, State.GLOBAL])
def test_no_state_is_left_out(state):
    with pytest.raises(SnapshotRefused, match="WRITING and cannot become"):
        at(Slots(), FIRST, State.WRITING).advanced(1, state)


def test_old_and_unknown_snapshots_are_refused():
    slots = at(Slots(), SECOND, State.GLOBAL)
    for snapshot in (FIRST, SECOND):
        with pytest.raises(SnapshotRefused, match="is not new: 2 is in memory"):
            slots.begun(snapshot)
    with pytest.raises(SnapshotRefused, match=r"snapshot 1 is in no slot; there are: snapshot 2 .* GLOBAL"):
        slots.advanced(1, State.LOCAL)


@pytest.mark.parametrize("state", list(State)[1:])
def test_giving_up_is_for_what_nobody_counts_on(state):
    slots = at(at(Slots(), FIRST, State.GLOBAL), SECOND, state)
    if state > State.LOCAL:
        with pytest.raises(SnapshotRefused, match="others may count on it"):
            slots.abandoned(2)
        return
    assert slots.abandoned(2).next_slot() == 1
    assert slots.abandoned(2) == slots.abandoned(2, by_all=True)
    assert slots.abandoned(2).state(1) is State.GLOBAL


def test_parity_is_given_up_where_another_node_did_and_global_never_is():
    slots = at(at(Slots(), FIRST, State.GLOBAL), SECOND, State.PARITY)
    assert slots.abandoned(2, by_all=True).slots == (Slot(State.GLOBAL, FIRST), Slot())
    with pytest.raises(SnapshotRefused, match="others may count on it"):
        slots.abandoned(1, by_all=True)


def test_a_new_generation_ends_what_was_being_written_and_fences_what_is_stale():
    slots = at(Slots(), FIRST, State.GLOBAL)
    fenced = at(slots, SECOND, State.WRITING).fenced(3)
    assert (fenced.generation, fenced.state(1), fenced.state(2)) == (3, State.GLOBAL, State.FREE)
    assert at(slots, SECOND, State.LOCAL).fenced(3).state(2) is State.LOCAL
    assert fenced.fenced(3) is fenced
    for stale in (lambda: fenced.fenced(2), lambda: fenced.begun(SECOND), lambda: fenced.check(2)):
        with pytest.raises(SnapshotRefused, match="is stale") as raised:
            stale()
        assert raised.value.reason == "generation"
    with pytest.raises(SnapshotRefused, match="no generation known here"):
        fenced.begun(Snapshot(4, 2, 20))


def test_a_restart_discards_what_is_newer_than_what_it_restores():
    slots = at(at(Slots(), FIRST, State.GLOBAL), SECOND, State.PARITY)
    assert slots.rolled_back(2) == slots
    assert slots.rolled_back(1).slots == (Slot(State.GLOBAL, FIRST), Slot())
    assert slots.rolled_back(0).slots == (Slot(), Slot())


def test_what_was_being_written_does_not_survive_the_memory_process():
    slots = at(Slots(), FIRST, State.GLOBAL)
    assert at(slots, SECOND, State.WRITING).survived() == slots
    assert at(slots, SECOND, State.LOCAL).survived() == at(slots, SECOND, State.LOCAL)


def test_rebuilding_keeps_the_older_snapshot():
    slots, index = at(at(Slots(), FIRST, State.GLOBAL), THIRD, State.LOCAL).rebuilding(SECOND)
    assert (index, slots.slots) == (1, (Slot(State.GLOBAL, FIRST), Slot(State.WRITING, SECOND)))
    assert Slots().rebuilding(SECOND)[1] == 0


@pytest.mark.parametrize("state", [State.LOCAL, State.PARITY, State.GLOBAL])
def test_rebuilding_takes_what_is_unfinished_before_the_oldest(state):
    rebuilt = Snapshot(0, 9, 90)
    assert at(at(Slots(), FIRST, State.GLOBAL), SECOND, State.WRITING).rebuilding(rebuilt)[1] == 1
    assert at(at(Slots(), FIRST, State.GLOBAL), SECOND, state).rebuilding(SECOND)[1] == 1
    assert at(at(Slots(), FIRST, State.GLOBAL), SECOND, state).rebuilding(rebuilt)[1] == 0
    kept, _ = at(Slots(), FIRST, state).rebuilding(SECOND)
    assert kept.state(1) is state


# ---- groups --------------------------------------------------------------------------------------------------------
def test_a_barrier_is_for_one_snapshot_of_one_generation():
    local, parity = (at(Slots(), FIRST, state) for state in (State.LOCAL, State.PARITY))
    assert every([local, parity], FIRST, State.LOCAL)
    assert not every([local, parity], FIRST, State.PARITY)
    assert not every([local, Slots()], FIRST, State.LOCAL)
    assert not every([local, local.fenced(1)], FIRST, State.LOCAL)
    assert not every([local, at(Slots(), Snapshot(0, 1, 11), State.LOCAL)], FIRST, State.LOCAL)


def test_what_is_restored_is_the_newest_that_all_survivors_hold_and_with_parity_where_some_are_lost():
    done = at(Slots(), FIRST, State.GLOBAL)
    newer, coded = at(done, SECOND, State.LOCAL), at(done, SECOND, State.PARITY)
    assert restorable([newer, coded]) == SECOND
    assert restorable([newer, done]) == FIRST
    assert restorable([newer, coded], 1, 1) == FIRST
    assert restorable([coded, coded], 1, 1) == SECOND
    assert restorable([coded, Slots()]) is None
    assert restorable([coded, coded], 2, 1) is None
    assert restorable([], 0, 1) is None
