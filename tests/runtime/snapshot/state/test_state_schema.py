"""Nested values as JSON and bytes, and back."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stowplan import InvalidArgument, InvalidSnapshot, SnapshotMismatch
from stowplan.runtime.snapshot.state.restore import restore
from stowplan.runtime.snapshot.state.state_schema import dump_schema
from stowplan.runtime.snapshot.state.training_state import TrainingState, flatten
from tests.runtime.snapshot.trainings import raw

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


def there_and_back(values: dict[str, Any]) -> dict[str, Any]:
    """What restoring gives for extras, by way of JSON text and bytes."""
    flat = flatten(TrainingState(model=nn.Identity(), extras=values))
    buffer = bytearray(b"\xa5" * flat.num_bytes)
    flat.copy_into(buffer)
    into = TrainingState(model=nn.Identity(), extras=dict.fromkeys(values))
    return restore(dump_schema(flat.schema), bytes(buffer), into).extras


def same(one: Any, other: Any) -> bool:
    """Equal in type and to the last bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return len(one) == len(other) and all(same(k, m) and same(v, w) for (k, v), (m, w) in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return math.isnan(one) == math.isnan(other) and one.hex() == other.hex()
    if isinstance(one, torch.Generator):
        return raw(one.get_state()) == raw(other.get_state())
    return bool(one == other)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    data = bytearray(draw(st.binary(min_size=num_bytes, max_size=num_bytes)))
    if dtype is torch.bool:
        data = bytearray(byte & 1 for byte in data)
    tensor = torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)
    if tensor.dim() > 1 and draw(st.booleans()):
        return tensor.transpose(0, -1)
    if tensor.dim() and draw(st.booleans()):
        return tensor[1:]
    return tensor


arrays = st.builds(
    lambda data, dtype, rows: np.frombuffer(data, dtype).reshape((rows, -1) if len(data) else (0, 3)),
    st.sampled_from([b"", bytes(range(144)), b"\xff" * 144]),
    st.sampled_from(["<f8", ">f4", "<i2", "u1", "<c16", "S3", "<M8[s]"]),
    st.sampled_from([1, 3]),
)
keys = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.binary(max_size=4)
)
leaves = st.one_of(
    *(keys, st.floats(), tensors(), arrays, st.sampled_from(DTYPES), st.just(torch.device("cuda:1"))),
    *(st.frozensets(keys, max_size=3), st.sets(keys, max_size=3), st.just(np.float32(0.1)), st.just(np.bool_(True))),
    *(st.just(torch.Size([2, 3])), st.builds(Counter, st.lists(st.integers(0, 3)))),
    st.builds(lambda seed: torch.Generator().manual_seed(seed), st.integers(0, 9)),
)
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        *(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)),
        *(st.dictionaries(keys, inner, max_size=3), st.dictionaries(keys, inner, max_size=3).map(OrderedDict)),
        st.dictionaries(st.tuples(keys, keys), inner, max_size=2),
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), nested, max_size=4))
def test_values_come_back_as_they_were(values: dict[str, Any]) -> None:
    assert same(there_and_back(values), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_every_dtype_comes_back(dtype: torch.dtype) -> None:
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (16 * 8 * dtype.itemsize,), dtype=torch.uint8)
    tensor = data.view(dtype).view(16, 8).t()[:, ::2]
    assert same(there_and_back({"tensor": tensor})["tensor"], tensor)


def test_conjugates_and_zero_dimensions() -> None:
    values = {"conj": torch.randn(3, dtype=torch.complex64).conj(), "scalar": torch.tensor(-0.0)}
    back = there_and_back(values)
    assert torch.equal(back["conj"], values["conj"].resolve_conj())
    assert same(back["scalar"], values["scalar"])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "is a builtins.object"),
        ({(1, object()): 2}, "has the key"),
        (np.array([object()]), "dtype object"),
        (1j, "is a builtins.complex"),
        ([lambda: 1], r"extras\.x\[0\] is a builtins\.function"),
    ],
)
def test_other_values_are_refused_by_path(value: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        flatten(TrainingState(model=nn.Identity(), extras={"x": value}))


# ---- damaged schemas -------------------------------------------------------------------------------------------------
def full() -> tuple[dict[str, Any], bytearray, TrainingState]:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step]),
        extras={"x": [1.5, np.arange(3), {"a": torch.Generator()}]},
    )
    flat = flatten(state)
    buffer = bytearray(flat.num_bytes)
    flat.copy_into(buffer)
    return json.loads(dump_schema(flat.schema)), buffer, state


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all members of nested JSON."""
    members = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, member in members for found in ((*path, key), *places(member, (*path, key)))]


@given(st.data())
def test_damaged_schemas_never_do_anything_but_fail_clearly(data: st.DataObject) -> None:
    schema, buffer, state = FULL
    damaged = copy.deepcopy(schema)
    path = data.draw(st.sampled_from(PLACES))
    holder = damaged
    for key in path[:-1]:
        holder = holder[key]
    new = data.draw(st.sampled_from([None, -1, 7, 10**12, "x", [], {}, {"float": "x"}, [1, 2], True, {"tensor": {}}]))
    holder[path[-1]] = new
    before = [raw(tensor) for tensor in state.model.state_dict().values()]
    try:
        restore(json.dumps(damaged), buffer, state)
    except (InvalidSnapshot, SnapshotMismatch):
        assert [raw(tensor) for tensor in state.model.state_dict().values()] == before


FULL = full()
PLACES = places(FULL[0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[]", "none of a snapshot"),
        (b'{"format":"stowplan snapshot","version":99}', "version 99, this stowplan reads 1"),
    ],
)
def test_what_is_no_schema_is_refused(text: bytes, said: str) -> None:
    with pytest.raises(InvalidSnapshot, match=said):
        restore(text, b"", TrainingState(model=nn.Identity()))


def test_bytes_that_are_missing_are_counted() -> None:
    schema, buffer, state = FULL
    with pytest.raises(InvalidSnapshot, match=rf"has {len(buffer)} bytes, and {len(buffer) - 1} were given"):
        restore(schema, buffer[:-1], state)
