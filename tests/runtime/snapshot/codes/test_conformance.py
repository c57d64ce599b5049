"""What every code keeps, with every kernel: what it stands is recovered bit for bit, all else is refused."""

from __future__ import annotations

import random as plain_random
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowplan import InvalidArgument, UnrecoverableSnapshot
from stowplan.runtime.snapshot.codes import Area, Chunk, Layout, Span, accumulate, code_for, crc32c, decode, encode
from tests.runtime.snapshot.codes import reference
from tests.runtime.snapshot.codes.conftest import KERNELS
from tests.runtime.snapshot.codes.groups import CODES, Group, least_nodes

SMALL = range(2, 9)


def sizes_for(n):
    yield [0] * n
    yield [1] * n
    yield [0] * (n - 1) + [1]
    yield [63 + 17 * i for i in range(n)]
    yield [(n - 1) * (n - 2 or 1) * 64] * n
    yield [1000 * (i % 3) + 7 * i for i in range(n)]


def check(group, lost, kernels):
    data, parity = group.damaged(lost)
    decode(group.layout, data, parity, lost=lost, kernels=kernels)
    assert data == group.data, lost
    assert parity == group.parity, lost


def check_every_loss(group, kernels):
    """Of up to one node more than the code stands."""
    for lost in reference.losses(group.code.n, group.code.m + 1):
        if group.code.survives(lost):
            check(group, lost, kernels)
        else:
            with pytest.raises(UnrecoverableSnapshot):
                group.layout.recovery(lost)


@pytest.fixture(params=CODES, ids=[name for name, _ in CODES])
def code(request):
    return request.param


@pytest.mark.parametrize("n", SMALL)
def test_every_loss_that_a_code_stands_is_recovered_and_no_other(code, n, kernels):
    name, m = code
    if n < least_nodes(m):
        pytest.skip("too few nodes")
    for sizes in sizes_for(n):
        group = Group(name, sizes, kernels)
        check_every_loss(group, kernels)


@pytest.mark.parametrize("n", SMALL)
def test_shares_are_read_where_their_copies_are(code, n, kernels):
    name, m = code
    if n < least_nodes(m):
        pytest.skip("too few nodes")
    group = Group(name, [100 + 13 * i for i in range(n)], kernels, shares=[64 * (i % 3) + 5 * i for i in range(n)])
    plan = group.layout.exchange()
    assert all(term.source.offset + term.source.length <= 100 + 13 * term.source.node for term in plan.terms)
    assert group.layout.parity_bytes == Group(name, [100 + 13 * i for i in range(n)], kernels).layout.parity_bytes
    check_every_loss(group, kernels)


@pytest.mark.parametrize("n", range(9, 17))
def test_larger_groups(code, n, kernels):
    name, m = code
    group = Group(name, [97 * i + 5 for i in range(n)], kernels)
    patterns = list(combinations(range(n), m))
    for lost in plain_random.Random(n).sample(patterns, min(8, len(patterns))):
        check(group, lost, kernels)


def test_megabytes(code, kernels):
    name, m = code
    group = Group(name, [(3 << 20) + 12_345, (2 << 20) + 1, 3 << 20, 5, 1 << 20], kernels)
    check(group, tuple(range(m)), kernels)


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_parities_and_decoded_bytes_are_those_of_slow_arithmetic(code, n, kernels):
    name, m = code
    group = Group(name, [301 + 29 * i for i in range(n)], kernels)
    shape = group.code.num_data_chunks, group.layout.chunk_bytes
    assert list(group.parity.values()) == reference.parities(name, list(group.data.values()), *shape)
    for lost in combinations(range(n), m):
        slowly = reference.recovered(name, group.data, group.parity, lost, *shape)
        data, parity = group.damaged(lost)
        decode(group.layout, data, parity, lost=lost, kernels=kernels)
        for node in lost:
            padded = bytes(data[node]).ljust(len(slowly[node]), b"\0")
            assert padded == slowly[node]


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_any_sizes_any_loss(draw):
    name, m = draw.draw(st.sampled_from(CODES))
    n = draw.draw(st.integers(least_nodes(m), 9))
    sizes = draw.draw(st.lists(st.integers(0, 2000), min_size=n, max_size=n))
    lost = draw.draw(st.sets(st.integers(0, n - 1), max_size=m))
    kernels = KERNELS[draw.draw(st.sampled_from(list(KERNELS)))]()
    shares = draw.draw(st.just([]) | st.lists(st.integers(0, 2000), min_size=n, max_size=n))
    check(Group(name, sizes, kernels, shares=shares), tuple(lost), kernels)


def test_terms_in_any_order_and_in_pieces_give_the_same_parity(code, kernels):
    name, _ = code
    group = Group(name, [1500 - 131 * i for i in range(6)], kernels)
    terms = list(group.layout.exchange().terms)
    shuffled = plain_random.Random(0)
    for _ in range(5):
        parity = {node: bytearray(group.layout.parity_bytes) for node in group.data}
        pieces = []
        for term in terms:
            cuts = sorted({0, term.source.length, *(shuffled.randrange(term.source.length) for _ in range(2))})
            pieces += [term.part(begin, end) for begin, end in pairwise(cuts)]
        shuffled.shuffle(pieces)
        for term in pieces:
            begin = term.source.offset
            chunk = group.data[term.source.node][begin : begin + term.source.length]
            accumulate(term, chunk, parity[term.destination.node], kernels=kernels)
        assert parity == group.parity


def test_lost_nodes_are_made_of_what_arrives_in_any_order(code, kernels):
    name, m = code
    group = Group(name, [900, 1311, 640, 77, 1200], kernels)
    lost = tuple(range(m))
    plan = group.layout.recovery(lost)
    assert {span.node for span in plan.destinations} == set(lost)
    assert not {span.node for span in plan.sources} & set(lost)
    buffers = {Area.DATA: dict(group.data), Area.PARITY: dict(group.parity)}
    for node in lost:
        for area in Area:
            buffers[area][node] = bytearray(group.layout.area_bytes(node, area))
    terms = list(plan.terms)
    plain_random.Random(1).shuffle(terms)
    for term in terms:
        span = term.source
        chunk = memoryview(buffers[span.area][span.node])[span.offset : span.offset + span.length]
        accumulate(term, chunk, buffers[term.destination.area][term.destination.node], kernels=kernels)
    assert buffers == {Area.DATA: group.data, Area.PARITY: group.parity}


@pytest.mark.parametrize("n", [2, 5, 8])
def test_each_node_sends_and_fetches_what_its_parity_takes_and_no_more(code, n):
    name, m = code
    if n < least_nodes(m):
        pytest.skip("too few nodes")
    chunks = code_for(n, m, name).num_data_chunks
    layout = Layout(code_for(n, m, name), chunks * 640)
    plan = layout.exchange()
    assert all(term.source.node != term.destination.node for term in plan.terms)
    for node in range(n):
        mine = layout.exchange(node)
        assert mine.terms == tuple(term for term in plan.terms if term.destination.node == node)
        assert {span.node for span in mine.destinations} == {node}
        # Each of a node's chunks goes into every parity of its stripe, and as much arrives as is sent.
        assert sum(term.source.length for term in mine.terms) == m * chunks * 640
        assert sum(term.source.length for term in plan.terms if term.source.node == node) == m * chunks * 640


def test_one_lost_node_is_recovered_by_xor_alone():
    plan = Layout(code_for(6, 2), 4000).recovery([2])
    data = [term for term in plan.terms if term.destination.area is Area.DATA]
    assert {term.coefficient for term in data} == {1}


@pytest.mark.parametrize("n", [3, 4, 6])
def test_any_bad_chunks_up_to_m_in_each_stripe_are_recovered(code, n, kernels):
    name, m = code
    group = Group(name, [700 + 41 * i for i in range(n)], kernels)
    chosen = plain_random.Random(n)
    for _ in range(10):
        bad = [chunk for stripe in group.code.stripes for chunk in chosen.sample(stripe.chunks, m)]
        recover_bad(group, [group.layout.span(chunk) for chunk in bad], kernels)


def test_a_lost_node_and_bad_chunks_of_others(kernels):
    group = Group("rs", [1000, 999, 998, 700, 1], kernels)
    spans = [
        group.layout.span(chunk)
        for stripe in group.code.stripes
        for chunk in [chunk for chunk in stripe.chunks if chunk.node != 3][:1]
    ]
    data, parity = ({i: bytearray(kept) for i, kept in area.items()} for area in (group.data, group.parity))
    data[3][:], parity[3][:] = bytes(len(data[3])), bytes(len(parity[3]))
    spoil(data, parity, spans)
    decode(group.layout, data, parity, lost=[3], bad=spans, kernels=kernels)
    assert (data, parity) == (group.data, group.parity)


def test_bad_blocks_in_different_columns_of_one_stripe_are_recovered(kernels):
    group = Group("raim5", [4096] * 4, kernels)
    first, second = group.code.stripes[0].data[:2]
    one, other = group.layout.span(first), group.layout.span(second)
    length = one.length
    recover_bad(group, [one.part(0, length // 2), other.part(length // 2, length)], kernels)
    with pytest.raises(UnrecoverableSnapshot) as raised:
        group.layout.recovery(bad=[one.part(0, length // 2 + 1), other.part(length // 2, length)])
    assert raised.value.lost == tuple(map(str, sorted([first, second])))


def test_a_bad_block_across_chunks_and_overlapping_blocks(code, kernels):
    name, _ = code
    group = Group(name, [5000] * 5, kernels)
    edge = group.layout.chunk_bytes if group.code.num_data_chunks > 1 else 100
    recover_bad(group, [Span(1, Area.DATA, edge - 50, 100), Span(1, Area.DATA, edge - 10, 90)], kernels)


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_any_bad_bytes_are_recovered_or_refused(draw):
    name, m = draw.draw(st.sampled_from(CODES))
    n = draw.draw(st.integers(least_nodes(m), 6))
    sizes = draw.draw(st.lists(st.integers(1, 600), min_size=n, max_size=n))
    kernels = KERNELS[draw.draw(st.sampled_from(list(KERNELS)))]()
    shares = draw.draw(st.just([]) | st.lists(st.integers(0, 300), min_size=n, max_size=n))
    group = Group(name, sizes, kernels, shares=shares)
    spans = []
    for _ in range(draw.draw(st.integers(0, 4))):
        node, area = draw.draw(st.integers(0, n - 1)), draw.draw(st.sampled_from(Area))
        begin = draw.draw(st.integers(0, group.layout.area_bytes(node, area) - 1))
        length = draw.draw(st.integers(0, group.layout.area_bytes(node, area) - begin))
        spans.append(Span(node, area, begin, length))
    if most_erased(group, spans) <= m:
        recover_bad(group, spans, kernels)
    else:
        with pytest.raises(UnrecoverableSnapshot):
            group.layout.recovery(bad=spans)


def most_erased(group, spans):
    """In one column of a stripe, counted byte by byte."""
    bad = {(span.node, span.area, span.offset + i) for span in spans for i in range(span.length)}
    return max(
        sum((span.node, span.area, span.offset + column) in bad for span in found if column < span.length)
        for found in ([group.layout.span(chunk) for chunk in stripe.chunks] for stripe in group.layout.stripes)
        for column in range(max(span.length for span in found))
    )


def spoil(data, parity, spans):
    for span in spans:
        area = data if span.area is Area.DATA else parity
        area[span.node][span.offset : span.offset + span.length] = b"\xee" * span.length


def recover_bad(group, spans, kernels):
    data, parity = ({i: bytearray(kept) for i, kept in area.items()} for area in (group.data, group.parity))
    spoil(data, parity, spans)
    decode(group.layout, data, parity, bad=spans, kernels=kernels)
    assert data == group.data
    assert parity == group.parity


def test_a_flipped_bit_that_a_checksum_finds_is_recovered(code, kernels):
    name, _ = code
    group = Group(name, [2048] * 4, kernels)
    span = group.layout.span(Chunk(2, Area.DATA, 0))
    expected = crc32c(group.data[2][: span.length], kernels=kernels)
    data = {i: bytearray(kept) for i, kept in group.data.items()}
    data[2][span.length // 2] ^= 0x10
    assert crc32c(data[2][: span.length], kernels=kernels) != expected
    decode(group.layout, data, group.parity, bad=[span], kernels=kernels)
    assert crc32c(data[2][: span.length], kernels=kernels) == expected
    assert data == group.data


def test_too_much_lost_is_refused_by_name_before_anything_is_written(kernels):
    group = Group("raim5", [100] * 4, kernels)
    data, parity = group.damaged((0, 2))
    with pytest.raises(UnrecoverableSnapshot) as raised:
        decode(group.layout, data, parity, lost=[2, 0], kernels=kernels)
    assert raised.value.lost == ("node 0", "node 2")
    assert "raim5 of 4 nodes stands the loss of any 1 node, or of 1 chunk in each stripe" in str(raised.value)
    assert (data, parity) == group.damaged((0, 2))


def test_a_lost_node_and_a_bad_chunk_are_both_named(kernels):
    group = Group("raim5", [100] * 3, kernels)
    with pytest.raises(UnrecoverableSnapshot) as raised:
        group.layout.recovery([1], [group.layout.span(Chunk(0, Area.DATA, 0))])
    assert raised.value.lost == ("node 1", "data chunk 0 of node 0")


def test_unaligned_buffers(code, kernels):
    name, m = code
    group = Group(name, [777] * 4, kernels)
    lost = tuple(range(m))
    frames = []

    def shifted(kept, node):
        frames.append(np.full(len(kept) + 16, 0xC3, np.uint8))
        view = frames[-1][node + 1 : node + 1 + len(kept)]
        view[:] = 0 if node in lost else np.frombuffer(kept, np.uint8)
        return view

    data, parity = ({i: shifted(kept, i) for i, kept in area.items()} for area in (group.data, group.parity))
    decode(group.layout, data, parity, lost=lost, kernels=kernels)
    assert {i: view.tobytes() for i, view in data.items()} == group.data
    assert {i: view.tobytes() for i, view in parity.items()} == group.parity
    assert all((frame[0], frame[-1]) == (0xC3, 0xC3) for frame in frames)


class TestRefusals:
    """Wrong buffers end in words, not in a crash, and nothing is written."""

    layout = Layout(code_for(3, 1), 200)

    def given(self, **changed):
        data = {i: bytes(200) for i in range(3)}
        parity = {i: bytearray(self.layout.parity_bytes) for i in range(3)}
        return {"data": data | changed.get("data", {}), "parity": parity | changed.get("parity", {})}

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"data": {1: bytes(199)}}, r"data\[1\] has 199 bytes: it is 200"),
            ({"data": {1: None}}, r"data\[1\] is NoneType, which gives no buffer"),
            ({"data": {2: np.zeros(400, np.uint8)[::2]}}, r"data\[2\] is not contiguous"),
            ({"parity": {0: bytearray(127)}}, r"parity\[0\] has 127 bytes: it is 128"),
            ({"parity": {0: bytes(128)}}, r"parity\[0\] is read-only"),
            ({"parity": {3: bytearray(128)}}, "node 3 is not in a group of 3"),
        ],
    )
    def test_encoding(self, changed, said):
        given = self.given(**changed)
        with pytest.raises(InvalidArgument, match=said):
            encode(self.layout, **given)

    def test_a_missing_node(self):
        given = self.given()
        del given["data"][0]
        with pytest.raises(InvalidArgument, match="data has no buffer for node 0"):
            encode(self.layout, **given)

    def test_overlapping_buffers(self):
        memory = bytearray(400)
        given = self.given(data={0: memoryview(memory)[:200]}, parity={1: memoryview(memory)[100:228]})
        with pytest.raises(InvalidArgument, match="overlap in memory"):
            encode(self.layout, **given)

    @pytest.mark.parametrize(
        ("span", "said"),
        [
            (Span(0, Area.DATA, 150, 51), r"bytes 150 to 201 of node 0's data are not there: it has 200 bytes"),
            (Span(0, Area.PARITY, -1, 5), "bytes -1 to 4 of node 0's parity"),
            (Span(0, Area.DATA, 5, -1), "bytes 5 to 4"),
            (Span(5, Area.DATA, 0, 1), "node 5 is not in a group of 3"),
        ],
    )
    def test_bad_bytes_that_are_not_there(self, span, said):
        with pytest.raises(InvalidArgument, match=said):
            self.layout.recovery(bad=[span])

    @pytest.mark.parametrize(
        ("sizes", "said"), [([1, 2], "node_bytes has 2 numbers"), (-1, "node_bytes has -1"), ([0, 1, -5], "has -5")]
    )
    def test_sizes(self, sizes, said):
        with pytest.raises(InvalidArgument, match=said):
            Layout(code_for(3, 1), sizes)

    @pytest.mark.parametrize(
        ("shares", "said"),
        [
            ([(1, 3), (2, 1)], "give 2 numbers for each of 3 nodes"),
            ([(1, 3), (2, 1), ()], "give 2 numbers for each of 3 nodes"),
            ([(1, 3, 2), (2, 1, 3), (3, 2, 1)], "its own share and those of the 1 before it, or nothing"),
            ([(1, 2), (2, 1), (3, 2)], "node 0 has 2 bytes of node 2's share of 3"),
            ([(-1, 3), (2, -1), (3, 2)], "node 0 has -1 bytes"),
            ([(1, 30), (2, 1), (30, 2)], "hold the shares"),
        ],
    )
    def test_shares(self, shares, said):
        with pytest.raises(InvalidArgument, match=said):
            Layout(code_for(3, 1), [20, 20, 40], shares)

    @pytest.mark.parametrize(
        ("source", "destination", "said"),
        [
            (bytes(5), bytearray(128), "source has 5 bytes"),
            (bytes(128), bytearray(100), "destination has 100 bytes"),
            (bytes(128), bytes(128), "destination is read-only"),
        ],
    )
    def test_accumulating(self, source, destination, said):
        term = self.layout.exchange().terms[0]
        assert term.source.length == 128
        with pytest.raises(InvalidArgument, match=said):
            accumulate(term, source, destination)

    def test_accumulating_into_the_source(self):
        memory = bytearray(128)
        with pytest.raises(InvalidArgument, match="overlap in memory"):
            accumulate(self.layout.exchange().terms[0], memory, memory)
