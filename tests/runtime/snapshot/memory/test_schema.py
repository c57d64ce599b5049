"""Schemas: every value comes back bit for bit, the same state gives the same bytes, and nothing else is read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan.core.errors import InvalidArgument
from stowplan.runtime.snapshot.memory.schema import Schema, Tensor, schema_from_bytes, schema_to_bytes

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)
TENSORS = (Tensor("weight", "bfloat16", (3, 5), 0, 30), Tensor("step", "float32", (), 64, 4))


def typed(value):
    """A value with all types and orders in it, as True == 1 == 1.0 and −0.0 == 0.0."""
    if isinstance(value, dict):
        return ("dict", [(typed(key), typed(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return (type(value).__name__, [typed(item) for item in value])
    return (type(value).__name__, value.hex() if isinstance(value, float) else value)


@given(VALUES)
def test_values_come_back_bit_for_bit(value):
    schema = Schema(TENSORS, {"world": 2}, {"weight": [0, 1]}, value)
    content = schema_to_bytes(schema)
    again = schema_from_bytes(memoryview(content))
    assert typed(again.values) == typed(value)
    assert (again.tensors, again.topology, again.layout) == (schema.tensors, schema.topology, schema.layout)
    assert schema_to_bytes(again) == content


@pytest.mark.parametrize("value", [0.1, -0.0, 5e-324, 1.7976931348623157e308, float("inf")])
def test_floats_are_written_as_hex(value):
    content = schema_to_bytes(Schema(values=value))
    assert value.hex() in content.decode()
    assert schema_from_bytes(content).values.hex() == value.hex()


def test_the_payload_ends_with_the_last_tensor():
    assert Schema(TENSORS).payload_bytes == 68
    assert Schema().payload_bytes == 0


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ((Tensor("a", "float32", (2,), 8, 8),), "offsets are multiples of 64, and 0 or more"),
        ((Tensor("a", "float32", (32,), 0, 128), Tensor("b", "float32", (2,), 64, 8)), "and 128 or more"),
        ((Tensor("a", "float32", (3,), 0, 8),), r"8 bytes are not a shape of \[3\]"),
        ((Tensor("a", "float32", (-1,), 0, 8),), r"8 bytes are not a shape of \[-1\]"),
        ((Tensor("a", "float32", (1,), 0, -4),), "-4 bytes are not"),
        ((Tensor("a", "float32", (), 0, 4), Tensor("a", "float32", (), 64, 4)), "the same name"),
    ],
)
def test_tensors_have_places_of_their_own(tensors, said):
    with pytest.raises(InvalidArgument, match=said):
        schema_to_bytes(Schema(tensors))


@pytest.mark.parametrize("value", [object(), {1, 2}, [{"a": 1j}]])
def test_other_types_are_refused_with_their_place(value):
    with pytest.raises(InvalidArgument, match=r"values.* of a snapshot is (object|set|complex)"):
        schema_to_bytes(Schema(values=value))


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"version":2}',
        b'{"version":1}',
        json.dumps({"version": 1, "tensors": [{"name": 1}], "topology": {}, "layout": {}, "values": 0}).encode(),
        *(
            json.dumps({"version": 1, "tensors": [], "topology": {}, "layout": {}, "values": value}).encode()
            for value in ({}, {"float": 1}, {"float": "x"}, {"bytes": "?"}, {"object": 1}, {"dict": [[1]]})
        ),
    ],
)
def test_what_is_no_schema_is_refused(damaged):
    with pytest.raises(InvalidArgument, match="this snapshot's schema"):
        schema_from_bytes(damaged)
