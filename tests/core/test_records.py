from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan.core.records import RecordError, from_plain, to_plain


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Leaf:
    name: str
    size: int
    weight: float = 1.0
    colour: Colour = Colour.RED


@dataclass(frozen=True, kw_only=True)
class Tree:
    leaves: tuple[Leaf, ...]
    pair: tuple[str, int] = ("x", 1)
    best: Leaf | None = None
    table: dict[str, int] = field(default_factory=dict)
    flag: bool = False
    choice: Colour | Leaf = Colour.RED


leaves = st.builds(
    Leaf, name=st.text(), size=st.integers(), weight=st.floats(allow_nan=False), colour=st.sampled_from(Colour)
)
trees = st.builds(
    Tree,
    leaves=st.lists(leaves, max_size=4).map(tuple),
    pair=st.tuples(st.text(), st.integers()),
    best=st.none() | leaves,
    table=st.dictionaries(st.text(), st.integers(), max_size=3),
    flag=st.booleans(),
    choice=st.sampled_from(Colour) | leaves,
)


@given(trees)
def test_plain_values_give_the_record_back(tree: Tree) -> None:
    assert from_plain(Tree, to_plain(tree)) == tree
    assert from_plain(Tree, json.loads(json.dumps(to_plain(tree)))) == tree


def test_defaults_may_be_left_out() -> None:
    assert from_plain(Tree, {"leaves": []}) == Tree(leaves=())


def test_an_int_will_do_for_a_float() -> None:
    leaf = from_plain(Leaf, {"name": "a", "size": 1, "weight": 2})
    assert isinstance(leaf.weight, float)


LEAF: dict[str, Any] = {"name": "a", "size": 1}


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ([], "$: list where dict is expected"),
        ({}, "$: key 'leaves' is missing"),
        ({"leaves": [], "twigs": 1}, "$: unknown key 'twigs'"),
        ({"leaves": {}}, "$.leaves: dict where list is expected"),
        ({"leaves": [LEAF, 3]}, "$.leaves[1]: int where dict is expected"),
        ({"leaves": [{"name": "a"}]}, "$.leaves[0]: key 'size' is missing"),
        ({"leaves": [{**LEAF, "size": 1.0}]}, "$.leaves[0].size: float where int is expected"),
        ({"leaves": [{**LEAF, "size": True}]}, "$.leaves[0].size: bool where int is expected"),
        ({"leaves": [{**LEAF, "weight": False}]}, "$.leaves[0].weight: bool where float is expected"),
        ({"leaves": [{**LEAF, "weight": 10**400}]}, "$.leaves[0].weight: the number is too large"),
        ({"leaves": [{**LEAF, "colour": "green"}]}, "$.leaves[0].colour: 'green' is none of 'red', 'blue'"),
        ({"leaves": [{**LEAF, "colour": []}]}, "$.leaves[0].colour: [] is none of 'red', 'blue'"),
        ({"leaves": [], "best": "a"}, "$.best: str where dict is expected"),
        ({"leaves": [], "pair": ["a"]}, "$.pair: 1 items where 2 are expected"),
        ({"leaves": [], "pair": ["a", "b"]}, "$.pair[1]: str where int is expected"),
        ({"leaves": [], "table": {"k": None}}, "$.table.k: NoneType where int is expected"),
        ({"leaves": [], "flag": 0}, "$.flag: int where bool is expected"),
        ({"leaves": [], "choice": "green"}, "$.choice: 'green' is none of 'red', 'blue'"),
        ({"leaves": [], "choice": {"name": "a"}}, "$.choice: key 'size' is missing"),
    ],
)
def test_every_mistake_is_named_by_its_path(plain: Any, message: str) -> None:
    with pytest.raises(RecordError) as caught:
        from_plain(Tree, plain)
    assert str(caught.value) == message


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["leaves", "pair", "best", "table", "flag"]), inner)
    ),
)


@given(anything)
def test_arbitrary_values_make_a_record_or_a_record_error(plain: Any) -> None:
    try:
        tree = from_plain(Tree, plain)
    except RecordError:
        return
    assert isinstance(tree, Tree)
