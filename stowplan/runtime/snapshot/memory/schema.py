"""What a slot's bytes are: tensors by name, dtype, shape and place, and Python values, as canonical JSON, never pickle.

The same state gives the same bytes of JSON on every machine and in every process. Floats are written by ``float.hex``,
so they come back bit for bit (of a NaN: that it is one); what JSON does not have (tuples, bytes, keys that are no
strings) is tagged.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from stowplan.core.errors import InvalidArgument
from stowplan.core.records import RecordError, from_plain, to_plain

__all__ = ["Schema", "Tensor", "Value", "schema_from_bytes", "schema_to_bytes"]

Value: TypeAlias = Any  # None, bool, int, float, str, bytes, and lists, tuples and dicts of them
VERSION = 1
_ALIGNMENT_BYTES = 64  # of tensors in the payload


@dataclass(frozen=True, slots=True)
class Tensor:
    """``num_bytes`` from ``offset`` of the payload on, in C order; ``dtype`` is torch's name, such as "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Schema:
    """One rank's part of a snapshot.

    Attributes:
        tensors: in the order of their offsets, which are multiples of 64; none overlaps another.
        topology: where this rank is: world size, rank, meshes.
        layout: how tensors that are shards are laid out over ranks.
        values: all else of the state.
    """

    tensors: tuple[Tensor, ...] = ()
    topology: dict[str, Value] = field(default_factory=dict)
    layout: dict[str, Value] = field(default_factory=dict)
    values: Value = None

    @property
    def payload_bytes(self) -> int:
        """What its tensors take."""
        return max((tensor.offset + tensor.num_bytes for tensor in self.tensors), default=0)

    def check(self) -> None:
        """Raise InvalidArgument unless tensors are where they may be."""
        end = 0
        for tensor in self.tensors:
            where = f"tensor {tensor.name!r} of a snapshot at offset {tensor.offset}"
            if tensor.offset % _ALIGNMENT_BYTES or tensor.offset < end:
                raise InvalidArgument(f"{where}: offsets are multiples of {_ALIGNMENT_BYTES}, and {end} or more here.")
            if min(tensor.num_bytes, *tensor.shape, 0) < 0 or tensor.num_bytes % max(math.prod(tensor.shape), 1):
                raise InvalidArgument(f"{where}: {tensor.num_bytes} bytes are not a shape of {list(tensor.shape)}.")
            end = tensor.offset + tensor.num_bytes
        if len({tensor.name for tensor in self.tensors}) < len(self.tensors):
            raise InvalidArgument("two tensors of a snapshot have the same name: give each its own.")


def schema_to_bytes(schema: Schema) -> bytes:
    """Canonical JSON. Raises InvalidArgument: tensors that overlap, or values of other types than ``Value`` has."""
    schema.check()
    plain = {
        "version": VERSION,
        "tensors": [to_plain(tensor) for tensor in schema.tensors],
        **{name: _tagged(getattr(schema, name), name) for name in ("topology", "layout", "values")},
    }
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def schema_from_bytes(content: bytes | memoryview) -> Schema:
    """What ``schema_to_bytes`` was given, bit for bit. Raises InvalidArgument for what it did not give."""
    try:
        plain = json.loads(bytes(content))
        if not isinstance(plain, dict) or plain.get("version") != VERSION:
            raise InvalidArgument(f"this snapshot's schema is not of version {VERSION}: restore it with what wrote it.")
        tensors = tuple(from_plain(Tensor, tensor, "$.tensors") for tensor in plain["tensors"])
        schema = Schema(tensors, *(_untagged(plain[name]) for name in ("topology", "layout", "values")))
    except (ValueError, KeyError, TypeError, RecursionError, RecordError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"this snapshot's schema cannot be read: {error!r}.") from error
    schema.check()
    return schema


def _tagged(value: Value, path: str) -> Any:
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        return {"float": value.hex()}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if type(value) in (list, tuple):
        items = [_tagged(item, f"{path}[{index}]") for index, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, dict):  # pairs, as order and types of keys count
        return {"dict": [[_tagged(key, path), _tagged(item, f"{path}[{key!r}]")] for key, item in value.items()]}
    raise InvalidArgument(
        f"{path} of a snapshot is {type(value).__name__}: a schema has None, bool, int, float, str, bytes, and lists, "
        f"tuples and dicts of them. Put arrays into the payload, and other objects' state into these."
    )


def _untagged(plain: Any) -> Value:
    if isinstance(plain, list):
        return [_untagged(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((tag, content),) = plain.items()
    match tag:
        case "float":
            return float.fromhex(content)
        case "bytes":
            return base64.b64decode(content, validate=True)
        case "tuple":
            return tuple(_untagged(item) for item in content)
        case "dict":
            return {_untagged(key): _untagged(item) for key, item in content}
    raise ValueError(f"unknown tag {tag!r}")
