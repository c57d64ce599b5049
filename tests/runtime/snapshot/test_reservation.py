"""What snapshots take of a host: the numbers that users give, and the arithmetic."""

from __future__ import annotations

import pytest

from stowplan.core.errors import InvalidArgument, InvalidSize
from stowplan.core.units import GIB, MIB
from stowplan.runtime.snapshot.codes import code_for
from stowplan.runtime.snapshot.memory.layout import Coding, Geometry
from stowplan.runtime.snapshot.reservation import Reservation, SlotBytes, SnapshotMemory


def test_one_node_has_no_parity_and_room_for_two():
    memory = Reservation.of(SlotBytes(64 * MIB, 64 * MIB))
    assert (memory.parity_bytes, memory.coding) == (0, Coding())
    assert memory.total_bytes == 2 * MIB + 2 * 64 * MIB  # headers and tables fit in the first 2 MiB


@pytest.mark.parametrize(("num_nodes", "m", "of_data"), [(2, 1, 1), (5, 1, 1 / 4), (6, 2, 2 / 4)])
def test_parity_is_the_code_s_share_of_the_data(num_nodes, m, of_data):
    code = SnapshotMemory(num_nodes=num_nodes, m=m).erasure_code
    memory = Reservation.of(SlotBytes(64 * MIB, 64 * MIB), code).member(code, 1)
    assert memory.parity_bytes == 64 * MIB * of_data
    assert memory.coding.index == 1
    assert memory.total_bytes == Geometry(64 * MIB, memory.parity_bytes, num_nodes).total_bytes
    assert memory.size.total_bytes >= 2 * (memory.data_bytes + memory.parity_bytes)


def test_what_has_copies_has_no_parity():
    code = code_for(5)
    memory = Reservation.of(SlotBytes(64 * MIB, 8 * MIB), code)
    assert (memory.data_bytes, memory.parity_bytes) == (64 * MIB, 2 * MIB)
    assert memory.holds(SlotBytes(60 * MIB, 8 * MIB), code)
    assert not memory.holds(SlotBytes(60 * MIB, 9 * MIB), code)
    assert not memory.holds(SlotBytes(65 * MIB, 8 * MIB), code)


def test_the_reserve_is_for_what_grows():
    assert SlotBytes(16 * GIB, 32 * MIB).with_reserve == SlotBytes(17 * GIB + MIB, GIB + 33 * MIB)


def test_users_numbers(monkeypatch):
    assert SnapshotMemory(num_nodes=4).erasure_code == code_for(4)
    assert SnapshotMemory(beside="1MiB").beside_bytes == MIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert SnapshotMemory().num_ranks_per_node == 8
    assert SnapshotMemory(ranks_per_node=2).num_ranks_per_node == 2


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"num_nodes": True}, "num_nodes=True"),
        ({"ranks_per_node": 0}, "ranks_per_node=0"),
        ({"num_nodes": 2, "m": 2}, "n=2 nodes: rs takes 3 or more"),
        ({"num_nodes": 3, "code": "raid"}, "is no code"),
    ],
)
def test_numbers_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(InvalidArgument, match=says):
        SnapshotMemory(**wrong)
    with pytest.raises(InvalidSize, match="beside"):
        SnapshotMemory(beside="much")
