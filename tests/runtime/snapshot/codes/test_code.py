"""Codes as data: their stripes, what they stand, who may ask for what."""

from __future__ import annotations

from itertools import combinations

import pytest

from stowplan import InvalidArgument
from stowplan.runtime.snapshot.codes import NAMES, Area, code_for
from tests.runtime.snapshot.codes.groups import CODES, least_nodes
from tests.runtime.snapshot.codes.reference import members


@pytest.mark.parametrize(("name", "m"), CODES)
@pytest.mark.parametrize("n", range(2, 17))
def test_each_chunk_is_in_one_stripe_and_each_stripe_on_different_nodes(name, m, n):
    if n < least_nodes(m):
        pytest.skip("too few nodes")
    code = code_for(n, m, name)
    chunks = [chunk for stripe in code.stripes for chunk in stripe.chunks]
    expected = {(i, Area.DATA, j) for i in range(n) for j in range(code.num_data_chunks)}
    expected |= {(i, Area.PARITY, j) for i in range(n) for j in range(code.num_parity_chunks)}
    assert len(chunks) == len(expected)
    assert {(chunk.node, chunk.area, chunk.index) for chunk in chunks} == expected
    for stripe in code.stripes:
        assert len({chunk.node for chunk in stripe.chunks}) == len(stripe.chunks)
        assert len(stripe.parity) == m


@pytest.mark.parametrize(("name", "m"), CODES)
@pytest.mark.parametrize("n", [3, 4, 7])
def test_stripes_are_those_of_the_formulas(name, m, n):
    for number, stripe in enumerate(code_for(n, m, name).stripes):
        data, parity, rows = members(name, n, number)
        assert [(chunk.node, chunk.index) for chunk in stripe.data] == data
        assert [(chunk.node, chunk.index) for chunk in stripe.parity] == parity
        assert [list(row) for row in stripe.coefficients] == rows


@pytest.mark.parametrize(("n", "name", "overhead"), [(2, "mirror", 1), (5, "raim5", 1 / 4), (6, "rs", 2 / 4)])
def test_parity_costs_what_is_promised(n, name, overhead):
    assert code_for(n, 2 if name == "rs" else 1, name).overhead == overhead


@pytest.mark.parametrize(("name", "m"), CODES)
@pytest.mark.parametrize("n", range(2, 9))
def test_up_to_m_lost_nodes_are_survived_and_more_only_by_mirrors_without_lost_neighbours(name, m, n):
    if n < least_nodes(m):
        pytest.skip("too few nodes")
    code = code_for(n, m, name)
    for size in range(n + 1):
        for lost in combinations(range(n), size):
            apart = not any((i + 1) % n in lost for i in lost)
            assert code.survives(lost) == (size <= m or (name == "mirror" and apart))


@pytest.mark.parametrize(
    ("n", "m", "chosen"), [(2, 1, "mirror"), (3, 1, "raim5"), (16, 1, "raim5"), (3, 2, "rs"), (257, 2, "rs")]
)
def test_a_code_is_chosen_by_what_may_be_lost(n, m, chosen):
    assert code_for(n, m).name == chosen


def test_one_lost_node_is_the_default():
    assert code_for(4) == code_for(4, 1, "raim5")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((1,), "n=1 nodes: mirror takes 2 or more"),
        ((0, 1, "raim5"), "n=0 nodes: raim5 takes 2 or more"),
        ((2, 2), "n=2 nodes: rs takes 3 or more"),
        ((258, 2), "rs takes 257 at most"),
        ((5, 3), "m=3 lost nodes"),
        ((5, 0), "m=0 lost nodes"),
        ((5, 2, "raim5"), "m=2 is not for raim5"),
        ((5, 1, "rs"), "m=1 is not for rs"),
        ((5, 1, "raid"), "name='raid' is no code: mirror, raim5, rs are"),
    ],
)
def test_what_no_code_is_for_is_refused(arguments, said):
    with pytest.raises(InvalidArgument, match=said):
        code_for(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_a_node_that_is_not_there_cannot_be_lost(name):
    with pytest.raises(InvalidArgument, match="node 4 is not in a group of 4: nodes are 0 to 3"):
        code_for(4, 2 if name == "rs" else 1, name).survives([1, 4])
