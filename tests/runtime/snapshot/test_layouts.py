"""Names of layouts and of memory processes, and which layout's memory is tried first."""

from __future__ import annotations

import pytest

from stowplan.runtime.snapshot.codes import code_for
from stowplan.runtime.snapshot.former import newest_first, taken_over
from stowplan.runtime.snapshot.layouts import Found, RankLayout, numbered, own_memory
from stowplan.runtime.snapshot.members import Member

ALONE, PAIR = RankLayout(1, 4), RankLayout.of(2, 2, code_for(2))
TRIPLE = RankLayout.of(3, 1, code_for(3))


@pytest.mark.parametrize("layout", [ALONE, PAIR, TRIPLE, RankLayout.of(5, 8, code_for(5, 2))])
@pytest.mark.parametrize("stand_in", [None, 3])
def test_a_process_is_named_by_node_and_layout(layout, stand_in):
    name = layout.process("host-1.rack", stand_in)
    assert RankLayout.parsed(name.removeprefix("host-1.rack.")) == layout
    assert (layout.code is None) == (layout.num_nodes == 1)
    assert layout.code is None or (layout.code.n, layout.code.name) == (layout.num_nodes, layout.code_name)


@pytest.mark.parametrize("suffix", ["", "2", "x2", "2x2-nothing-1", "2x2-rs", "b.2x2", "2x2.0.0"])
def test_other_names_are_none(suffix):
    assert RankLayout.parsed(suffix) is None


def test_the_newest_generation_comes_first_and_what_is_empty_not_at_all():
    found = [
        Found(PAIR, "a.2", 0, 10, 0, (1, 9)),
        Found(PAIR, "b.2", 1, 10, 0, None),
        Found(TRIPLE, "a.3", 0, 10, 0, (2, 1)),
        Found(ALONE, "a.1", 0, 10, 0, None),
    ]
    assert newest_first(found) == [TRIPLE, PAIR]


def test_nodes_have_the_numbers_of_their_memory_and_newcomers_free_ones():
    process = {node: TRIPLE.process(node) for node in "abcd"}
    found = {
        "c": [Found(TRIPLE, process["c"], 2, 10, 0, (1, 9)), Found(PAIR, "c.2", 0, 10, 0, (7, 9))],
        "a": [Found(TRIPLE, process["a"], 0, 10, 0, (1, 9))],
    }
    assert numbered("acd", TRIPLE, found) == {"a": 0, "c": 2, "d": 1}
    found["d"] = [Found(TRIPLE, process["d"], 2, 10, 0, (2, 1))]
    assert numbered("acd", TRIPLE, found) == {"a": 0, "d": 2, "c": 1}, "the newer one has it"
    assert numbered("abc", TRIPLE, {}) == {"a": 0, "b": 1, "c": 2}


def test_what_stands_in_for_another_node_is_not_a_nodes_own():
    own, stand_in = (Found(PAIR, PAIR.process("a", index), index or 0, 10, 0, (1, 1)) for index in (None, 1))
    assert own_memory("a", PAIR, [stand_in, own]) == own
    assert own_memory("a", PAIR, [stand_in]) is None
    assert numbered("ab", PAIR, {"a": [stand_in]}) == {"a": 0, "b": 1}


def test_memory_of_all_nodes_is_taken_care_of_once():
    found = [
        [Found(TRIPLE, "a", 2, 10, 0, (1, 1)), Found(PAIR, "x", 0, 10, 0, (1, 1))],
        [],
        [Found(TRIPLE, "c", 0, 10, 0, None)],
    ]
    taken = [taken_over(TRIPLE, found, rank, "n", lambda *names: names) for rank in range(3)]
    assert taken == [
        {Member(1, 0): ("n.3x1-raim5-1.1", 0, 1), Member(2, 0): ("a", 0, 1)},
        {},
        {Member(0, 0): ("c", 0, 1)},
    ]
