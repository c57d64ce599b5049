"""A rank's memory: where things are, headers that change at once, and that no changed bit goes unnoticed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from stowplan.core.errors import InvalidArgument
from stowplan.runtime.snapshot.memory import layout
from stowplan.runtime.snapshot.memory.layout import (
    CHUNK_BYTES,
    Coding,
    Geometry,
    Header,
    chunk_crcs,
    damage,
    invalidate,
    num_chunks,
    payload_offset,
    read_header,
    write_header,
    write_table,
)
from stowplan.runtime.snapshot.memory.slots import Snapshot, State

GEOMETRY = Geometry(CHUNK_BYTES + 1000, 500, 4)
DATA_BYTES, SCHEMA_BYTES, PARITY_BYTES = CHUNK_BYTES + 900, 100, 400
SLOT = 1


@pytest.fixture
def region():
    """Slot 1 is GLOBAL and full of random bytes."""
    view = memoryview(bytearray(GEOMETRY.total_bytes))
    content = random.Random(0)
    data = GEOMETRY.data_view(view, SLOT, DATA_BYTES)
    data[:] = content.randbytes(DATA_BYTES)
    parity = GEOMETRY.parity_view(view, SLOT, PARITY_BYTES)
    parity[:] = content.randbytes(PARITY_BYTES)
    first = num_chunks(GEOMETRY.data_capacity_bytes)
    header = Header(
        run="job-7",
        state=State.GLOBAL,
        snapshot=Snapshot(2, 3, 300),
        geometry=GEOMETRY,
        data_bytes=DATA_BYTES,
        schema_bytes=SCHEMA_BYTES,
        parity_bytes=PARITY_BYTES,
        schema_crc=layout.crc32c(data[:SCHEMA_BYTES]),
        data_table_crc=write_table(view, GEOMETRY, SLOT, 0, chunk_crcs(data)),
        parity_table_crc=write_table(view, GEOMETRY, SLOT, first, chunk_crcs(parity)),
        coding=Coding("raim5", 4, 1, 2),
    )
    write_header(view, SLOT, header)
    return view


def flipped(region, offset, bit):
    region[offset] ^= 1 << bit


# ---- places --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("geometry", [Geometry(1), GEOMETRY, Geometry(37 * CHUNK_BYTES, 13 * CHUNK_BYTES + 1)])
def test_areas_follow_each_other_and_do_not_overlap(geometry):
    areas = [(0, 2 * 4096)]
    areas += [(geometry.table(slot), geometry.num_table_bytes) for slot in (0, 1)]
    areas += [(geometry.data(slot), geometry.data_capacity_bytes) for slot in (0, 1)]
    areas += [(geometry.parity(slot), geometry.parity_capacity_bytes) for slot in (0, 1)]
    end = 0
    for begin, length in areas:
        assert begin >= end
        end = begin + length
    assert end <= geometry.total_bytes
    for begin, _ in areas[3:]:
        assert begin % (2 << 20) == 0


def test_views_stay_within_what_was_reserved():
    view = memoryview(bytearray(GEOMETRY.total_bytes))
    assert len(GEOMETRY.data_view(view, 0, GEOMETRY.data_capacity_bytes)) == GEOMETRY.data_capacity_bytes
    for size in (-1, GEOMETRY.data_capacity_bytes + 1):
        with pytest.raises(InvalidArgument, match=f"{size} bytes of data are not within a slot"):
            GEOMETRY.data_view(view, 0, size)
    for sizes in ((0, 0), (-1, 0), (1, -1), (1 << 60, 0)):
        with pytest.raises(InvalidArgument, match="is no number of bytes that a slot can have"):
            Geometry(*sizes)


def test_payloads_are_aligned():
    assert [payload_offset(size) for size in (0, 1, 64, 65)] == [0, 64, 64, 128]


# ---- headers -------------------------------------------------------------------------------------------------------
def test_a_header_comes_back(region):
    header = read_header(region, SLOT)
    assert (header.run, header.snapshot, header.state) == ("job-7", Snapshot(2, 3, 300), State.GLOBAL)
    assert (header.geometry, header.coding) == (GEOMETRY, Coding("raim5", 4, 1, 2))
    assert (header.data_bytes, header.schema_bytes, header.parity_bytes) == (DATA_BYTES, SCHEMA_BYTES, PARITY_BYTES)
    assert not damage(region, SLOT, header)
    assert read_header(region, 1 - SLOT) is None


def test_the_longest_names_come_back(region):
    geometry = replace(GEOMETRY, num_nodes=65535)
    coding = Coding("c" * 8, 65535, 2, 65534)
    header = replace(read_header(region, SLOT), run="r" * 64, geometry=geometry, coding=coding)
    write_header(region, SLOT, header)
    assert replace(read_header(region, SLOT), revision=0) == replace(header, revision=0)


def test_a_header_of_the_other_slot_does_not_count(region):
    region[:4096] = bytes(region[4096:8192])
    assert read_header(region, 0) is None


def test_whoever_is_killed_while_writing_a_header_leaves_the_former_one_in_force(region):
    former = read_header(region, SLOT)
    before = bytes(region[:8192])
    write_header(region, SLOT, replace(former, state=State.LOCAL))
    after = bytes(region[:8192])
    changed = [index for index in range(8192) if before[index] != after[index]]
    for end in changed:  # all bytes before are written
        region[:8192] = after[:end] + before[end:]
        assert read_header(region, SLOT) == former
    region[:8192] = after
    assert read_header(region, SLOT) == replace(former, state=State.LOCAL, revision=former.revision + 1)


def test_invalidating_leaves_nothing_of_the_former_snapshot(region):
    former = read_header(region, SLOT)
    write_header(region, SLOT, replace(former, state=State.LOCAL))
    invalidate(region, SLOT)
    assert read_header(region, SLOT) is None
    assert not any(region[:8192])


# ---- any flipped bit -----------------------------------------------------------------------------------------------
def test_any_flipped_bit_of_a_header_takes_it_out_of_force(region):
    begin = bytes(region).index(b"STOWSNAP")
    for offset in range(begin, begin + 512):
        flipped(region, offset, offset % 8)
        assert read_header(region, SLOT) is None
        flipped(region, offset, offset % 8)
    assert read_header(region, SLOT) is not None


def test_a_flipped_bit_of_the_newest_header_gives_the_one_before(region):
    former = read_header(region, SLOT)
    before = bytes(region[:8192])
    write_header(region, SLOT, replace(former, state=State.LOCAL))
    place = next(index for index in range(8192) if before[index] != region[index])
    flipped(region, place + 30, 0)
    assert read_header(region, SLOT) == former


def test_any_flipped_bit_of_data_or_schema_is_noticed_in_its_chunk(region):
    header, start = read_header(region, SLOT), GEOMETRY.data(SLOT)
    chunks = [(0, CHUNK_BYTES), (CHUNK_BYTES, 900)]
    choice = random.Random(1)
    for offset in (0, SCHEMA_BYTES - 1, CHUNK_BYTES - 1, CHUNK_BYTES, DATA_BYTES - 1, choice.randrange(DATA_BYTES)):
        for bit in (0, choice.randrange(8)):
            flipped(region, start + offset, bit)
            found = damage(region, SLOT, header)
            assert (found.data, found.parity) == ((chunks[offset // CHUNK_BYTES],), ())
            flipped(region, start + offset, bit)
    assert not damage(region, SLOT, header)


def test_any_flipped_bit_of_parity_is_noticed(region):
    header = read_header(region, SLOT)
    for offset in range(0, PARITY_BYTES, 57):
        flipped(region, GEOMETRY.parity(SLOT) + offset, offset % 8)
        assert damage(region, SLOT, header) == layout.Damage((), ((0, PARITY_BYTES),))
        flipped(region, GEOMETRY.parity(SLOT) + offset, offset % 8)
    local = replace(header, state=State.LOCAL)
    flipped(region, GEOMETRY.parity(SLOT), 0)
    assert not damage(region, SLOT, local), "there is no parity yet"


def test_any_flipped_bit_of_a_table_is_noticed(region):
    header, start = read_header(region, SLOT), GEOMETRY.table(SLOT)
    everything = ((0, CHUNK_BYTES), (CHUNK_BYTES, 900))
    for offset in range(12):
        flipped(region, start + offset, offset % 8)
        expected = (everything, ()) if offset < 8 else ((), ((0, PARITY_BYTES),))
        found = damage(region, SLOT, header)
        assert (found.data, found.parity) == expected
        assert found
        flipped(region, start + offset, offset % 8)


def test_a_schema_that_is_not_the_header_s_is_noticed(region):
    header = read_header(region, SLOT)
    assert damage(region, SLOT, replace(header, schema_crc=header.schema_crc ^ 1)).data[0] == (0, CHUNK_BYTES)
