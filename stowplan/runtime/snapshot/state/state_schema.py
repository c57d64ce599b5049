"""Nested values as a JSON schema and a list of tensors, and back. No pickle: only what is listed here can come out.

Nodes of the schema:

| value | node |
|---|---|
| None, bool, str, int | itself |
| float | {"float": hex} |
| bytes | {"bytes": base64} |
| list, tuple, torch.Size, set, frozenset | {"list": [node, …]}, {"tuple": …}, "size", "set", "frozenset" |
| dict, OrderedDict, Counter | {"dict": [[key node, node], …]}, in order, {"ordered": …}, {"counter": …} |
| tensor | {"tensor": leaf} |
| NumPy array, NumPy scalar | {"array": [dtype, leaf of bytes, shape]}, {"scalar": [dtype, base64]} |
| torch.dtype, torch.device | {"dtype": name}, {"device": name} |
| torch.Generator | {"generator": [device, leaf of its state]} |

JSON objects have their keys sorted, a value's own dictionaries keep their order: it may matter.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Replicate

from stowplan.core.errors import InvalidArgument, InvalidSnapshot
from stowplan.runtime.snapshot.state.leaf import DTYPES, Leaf, Shard
from stowplan.runtime.snapshot.state.payload import Payload, Portion

__all__ = ["VERSION", "Decoder", "Encoder", "dump_schema", "envelope", "load_schema"]

VERSION = 1
_FORMAT = "stowplan snapshot"
_SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple, "size": torch.Size, "set": set, "frozenset": frozenset}
_MAPPINGS: dict[str, type] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}
_TAG_OF = {kind: tag for tag, kind in (*_SEQUENCES.items(), *_MAPPINGS.items())}


class Encoder:
    """Takes values apart. Tensors are referred to, never copied.

    Args:
        portions: what the snapshot has of replicated tensors, by their paths.
        share: where those lie of which other nodes have copies; ``move_share`` puts it behind all else.

    Attributes:
        owned: whether plain tensors of what is encoded next are this rank's to write to disk.
        elsewhere: paths of those that are not.
        sharded: whether what is encoded next may be distributed, or replicated.
        own: where all else lies.
    """

    def __init__(self, portions: Mapping[str, Portion] | None = None, share: Payload | None = None) -> None:
        self.owned = self.sharded = True
        self.elsewhere: Collection[str] = ()
        self.own, self._share = Payload(), share or Payload()
        self._portions = portions or {}
        self._moving: list[dict[str, Any]] = []
        self._shards: dict[tuple[Any, ...], Shard] = {}

    def move_share(self, begin: int) -> None:
        """Nodes made so far say from now on that the share begins at this offset."""
        for plain in self._moving:
            plain["offset"] += begin
        self._moving.clear()

    def encode(self, value: Any, path: str) -> Any:
        """The node of a value.

        Raises:
            InvalidArgument: something at or below ``path`` cannot be expressed; names path and type.
        """
        kind = type(value)
        if value is None or kind in (bool, str, int):
            return value
        if kind is float:
            return {"float": value.hex()}
        if kind in (bytes, bytearray):
            return {"bytes": base64.b64encode(value).decode("ascii")}
        if kind in _TAG_OF:
            return {_TAG_OF[kind]: self._members(value, path)}
        if isinstance(value, torch.Tensor):
            leaf = self.leaf(value, path)
            plain = leaf.to_json()
            portion = self._portion(path)
            if portion is not None and portion.copied and leaf.num_bytes:
                self._moving.append(plain)
            return {"tensor": plain}
        if isinstance(value, np.ndarray | np.generic):
            return self._numpy(value, path)
        if kind is torch.dtype:
            return {"dtype": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"device": str(value)}
        if kind is torch.Generator:
            return {"generator": [str(value.device), self.leaf(value.get_state(), path).to_json()]}
        raise InvalidArgument(
            f"{path} is a {kind.__module__}.{kind.__qualname__}, which a snapshot cannot hold. Allowed are None, bool, "
            f"int, float, str, bytes, list, tuple, set, dict, NumPy arrays and numbers, tensors and torch.Generator; "
            f"turn it into these, or give it a state_dict and a load_state_dict and pass it by itself."
        )

    def _members(self, value: Any, path: str) -> list[Any]:
        if isinstance(value, dict):
            return [
                [self._key(key, path), self.encode(member, f"{path}.{key}" if path else str(key))]
                for key, member in value.items()
            ]
        if isinstance(value, set | frozenset):
            return sorted((self._key(member, path) for member in value), key=json.dumps)
        return [self.encode(member, f"{path}[{index}]") for index, member in enumerate(value)]

    def _key(self, key: Any, path: str) -> Any:
        if key is None or type(key) in (bool, str, int, float, bytes):
            return self.encode(key, path)
        if type(key) is tuple:
            return {"tuple": [self._key(part, path) for part in key]}
        raise InvalidArgument(
            f"{path} has the key {key!r}, a {type(key).__qualname__}. Keys of dictionaries and members of sets may be "
            f"None, bool, int, float, str, bytes and tuples of these."
        )

    def _numpy(self, value: np.ndarray[Any, Any] | np.generic, path: str) -> dict[str, Any]:
        if value.dtype.kind not in "biufcmMSU":
            raise InvalidArgument(
                f"{path} is a NumPy {type(value).__name__} of dtype {value.dtype}, which a snapshot cannot hold. "
                f"Allowed are bool, numbers, times and strings of fixed length; split structures into plain arrays."
            )
        if isinstance(value, np.generic):
            return {"scalar": [value.dtype.str, base64.b64encode(value.tobytes()).decode("ascii")]}
        raw = torch.from_numpy(np.frombuffer(bytearray(value.tobytes()), np.uint8)) if value.size else torch.empty(0)
        return {"array": [value.dtype.str, self.leaf(raw.to(torch.uint8), path).to_json(), list(value.shape)]}

    def leaf(self, tensor: torch.Tensor, path: str) -> Leaf:
        """A place for a tensor's bytes; the one that it has, if the same memory was met before."""
        shard, owned, share, payload = None, self.owned and path not in self.elsewhere, None, self.own
        if isinstance(tensor, DTensor):
            if not self.sharded:
                raise InvalidArgument(
                    f"{path} is a DTensor; distributed tensors are held for models and optimizers only. Pass what it "
                    f"is of as one of the models, or give its local part: to_local()."
                )
            if any(placement.is_partial() for placement in tensor.placements):
                raise InvalidArgument(
                    f"{path} is a DTensor whose sum is still to be made (Partial). Take snapshots between steps, or "
                    f"redistribute it first."
                )
            shard = self._shard(tensor)
            replicated = (isinstance(placement, Replicate) for placement in tensor.placements)
            owned = not any(place for place, whole in zip(shard.coordinate, replicated, strict=True) if whole)
            with torch.no_grad():  # nothing is dispatched then
                tensor = tensor.to_local()
        tensor = tensor.detach()
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            raise InvalidArgument(
                f"{path} is a {type(tensor).__name__} with layout {tensor.layout}; a snapshot holds plain strided "
                f"tensors and DTensors of these. Convert it first, or pass an object with state_dict and "
                f"load_state_dict that does."
            )
        if tensor.is_quantized or tensor.device.type not in ("cpu", "cuda"):
            raise InvalidArgument(
                f"{path} is {tensor.dtype} on {tensor.device}; a snapshot holds tensors on cpu and cuda, of dtypes "
                f"that are not quantized. Initialise or convert it first."
            )
        tensor = tensor.resolve_conj().resolve_neg()
        portion = self._portion(path)
        if portion is not None:
            tensor, share, owned = portion.of(tensor), portion.share, portion.owned
            payload = self._share if portion.copied else self.own
        return Leaf(tensor.dtype, tuple(tensor.shape), payload.place(tensor), tensor.device.type, owned, shard, share)

    def _portion(self, path: str) -> Portion | None:
        return self._portions.get(path) if self.sharded else None

    def _shard(self, tensor: DTensor) -> Shard:
        """Worked out once for all tensors that are sharded alike: that takes longer than anything else here."""
        alike = (tensor.device_mesh, tensor.placements, tensor.shape)
        if alike not in self._shards:
            self._shards[alike] = Shard.of(tensor)
        return self._shards[alike]


class Decoder:
    """Puts values together again out of nodes and a buffer's bytes.

    Args:
        data: all bytes, a tensor of uint8. None: only leaves are looked at, and arrays and generators are refused.
        num_bytes: how many bytes there should be.
    """

    def __init__(self, data: torch.Tensor | None, num_bytes: int) -> None:
        self._data, self._num_bytes = data, num_bytes

    def view(self, leaf: Leaf) -> torch.Tensor:
        """A tensor's bytes as they lie in the buffer, without a copy."""
        assert self._data is not None
        if not leaf.num_bytes:
            return torch.empty(leaf.shape, dtype=leaf.dtype)
        return self._data[leaf.offset : leaf.offset + leaf.num_bytes].view(leaf.dtype).view(leaf.shape)

    def fresh(self, leaf: Leaf) -> torch.Tensor:
        """A tensor of its own with the same bits, on the CPU."""
        return self.view(leaf).clone()

    def decode(self, node: Any, path: str, tensor: Callable[[Leaf], Any] | None = None) -> Any:
        """The value of a node; ``tensor`` says what stands for a tensor (default: a new one).

        Raises:
            InvalidSnapshot: no node of this format; names where.
        """
        try:
            return self._decode(node, path, tensor or self.fresh)
        except InvalidSnapshot:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InvalidSnapshot(
                f"{path or 'the schema'} cannot be read: {type(error).__name__}: {error}. The schema is damaged; go on "
                f"from another snapshot."
            ) from error

    def _decode(self, node: Any, path: str, tensor: Callable[[Leaf], Any]) -> Any:
        if node is None or type(node) in (bool, str, int):
            return node
        if type(node) is not dict or len(node) != 1:
            raise InvalidSnapshot(f"{path}: {str(node)[:80]!r} is no node of a snapshot's schema.")
        ((tag, content),) = node.items()
        if tag in _SEQUENCES:
            members = [self.decode(member, f"{path}[{index}]", tensor) for index, member in enumerate(content)]
            return _SEQUENCES[tag](members)
        if tag in _MAPPINGS:
            pairs = [(self.decode(key, path), member) for key, member in content]
            return _MAPPINGS[tag](
                {key: self.decode(member, f"{path}.{key}" if path else str(key), tensor) for key, member in pairs}
            )
        match tag, content:
            case "float", str():
                return float.fromhex(content)
            case "bytes", str():
                return base64.b64decode(content, validate=True)
            case "tensor", dict():
                return tensor(self.leaf(content, path))
            case "array", [str(dtype), dict(leaf), list(shape)]:
                raw = self.fresh(self.leaf(leaf, path)).numpy()
                return raw.view(_numpy_dtype(dtype)).reshape(shape)
            case "scalar", [str(dtype), str(raw)]:
                return np.frombuffer(base64.b64decode(raw, validate=True), _numpy_dtype(dtype))[0]
            case "dtype", str():
                return DTYPES[content]
            case "device", str():
                return torch.device(content)
            case "generator", [str(device), dict(leaf)]:
                generator = torch.Generator(device)
                generator.set_state(self.fresh(self.leaf(leaf, path)))
                return generator
        raise InvalidSnapshot(f"{path}: {tag!r} with {str(content)[:80]!r} is no node of a snapshot's schema.")

    def leaf(self, plain: dict[str, Any], path: str) -> Leaf:
        """A leaf whose bytes are within the buffer."""
        leaf = Leaf.from_json(plain)
        if leaf.offset + leaf.num_bytes > self._num_bytes:
            raise InvalidSnapshot(
                f"{path}: its bytes {leaf.offset} to {leaf.offset + leaf.num_bytes} are not within the snapshot's "
                f"{self._num_bytes}. The schema is damaged; go on from another snapshot."
            )
        return leaf


def dump_schema(schema: dict[str, Any]) -> bytes:
    """A schema as canonical JSON: sorted keys, no blanks, ASCII."""
    return json.dumps(schema, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def load_schema(schema: dict[str, Any] | bytes | str) -> dict[str, Any]:
    """A schema out of its JSON, its envelope checked.

    Raises:
        InvalidSnapshot: no JSON, no schema, or of another version.
    """
    if not isinstance(schema, dict):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise InvalidSnapshot(f"the schema is no JSON: {error}. Go on from another snapshot.") from error
    if not isinstance(schema, dict) or schema.get("format") != _FORMAT:
        raise InvalidSnapshot(f"the schema is none of a snapshot: no {_FORMAT!r} at its beginning.")
    if schema.get("version") != VERSION:
        raise InvalidSnapshot(
            f"the schema has version {schema.get('version')!r}, this stowplan reads {VERSION}. Use the stowplan that "
            f"wrote it."
        )
    for name in ("bytes", "rank", "step", "world_size"):
        if type(schema.get(name)) is not int or schema[name] < 0:
            raise InvalidSnapshot(f"the schema's {name} is {schema.get(name)!r}, no count. It is damaged.")
    if type(schema.get("state")) is not dict:
        raise InvalidSnapshot("the schema has no state. It is damaged.")
    return schema


def envelope(state: Any, *, num_bytes: int, rank: int, step: int, world_size: int) -> dict[str, Any]:
    """A whole schema around the node of the state."""
    return {
        "format": _FORMAT,
        "version": VERSION,
        "bytes": num_bytes,
        "rank": rank,
        "step": step,
        "world_size": world_size,
        "state": state,
    }


def _numpy_dtype(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if dtype.kind not in "biufcmMSU":
        raise ValueError(f"NumPy's {name} is not allowed")
    return dtype
