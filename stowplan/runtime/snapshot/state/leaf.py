"""A tensor of a snapshot: what its bytes mean, where they are, and which part of a larger tensor they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from stowplan.core.errors import InvalidArgument

__all__ = ["ALIGNMENT", "DTYPES", "Leaf", "Shard", "Share"]

ALIGNMENT = 64  # bytes; a cache line, and a multiple of every element's size
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a distributed tensor a rank has.

    Attributes:
        shape: of the whole tensor.
        offsets: where this rank's part begins, in each dimension.
        placements: as torch writes them, one for each dimension of the mesh: S(0), R.
        mesh: the mesh's shape.
        coordinate: this rank's place in the mesh.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    placements: tuple[str, ...]
    mesh: tuple[int, ...]
    coordinate: tuple[int, ...]

    @classmethod
    def of(cls, tensor: DTensor) -> Shard:
        """That of a live tensor, whose placements must be no sums to come (Partial).

        Raises InvalidArgument: ranks are not in order along a dimension of the mesh that shards.
        """
        mesh = tensor.device_mesh
        for dim, place in enumerate(mesh.get_coordinate() or ()):
            if tensor.placements[dim].is_shard() and mesh.get_local_rank(dim) != place:
                raise InvalidArgument(
                    f"the mesh {mesh.mesh.tolist()} has ranks that do not ascend along dimension {dim}, by which "
                    f"tensors are sharded: torch shards them by ascending ranks, and says otherwise. Put the ranks in "
                    f"order, as init_device_mesh does."
                )
        (chunk,) = tensor.__create_chunk_list__()
        return cls(
            tuple(tensor.shape),
            tuple(chunk.offsets),
            tuple(str(placement) for placement in tensor.placements),
            tuple(tensor.device_mesh.shape),
            tuple(tensor.device_mesh.get_coordinate() or ()),
        )


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of what several ranks have the same of this rank's snapshot has; the others have the rest.

    Attributes:
        dim: the dimension that is divided.
        begin: where this part begins in it.
        whole: how long it is on each of these ranks.
        family: the lowest of these ranks: shares of one tensor with the same family make it whole.
    """

    dim: int
    begin: int
    whole: int
    family: int


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor of a snapshot: where its bytes are, and what they mean.

    Attributes:
        dtype, shape: of what this rank's snapshot has; bytes lie in row-major order.
        offset: in the buffer, a multiple of 64.
        device: the kind of device that it was on.
        owned: whether this rank, of all that have the same bytes, is the one to write them to disk.
        shard: for a distributed tensor: the part of it that this rank trains.
        share: for a replicated tensor: the part of what this rank trains that its snapshot has.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    device: str
    owned: bool
    shard: Shard | None = None
    share: Share | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of what this rank trains."""
        if self.share is None:
            return self.shape
        return (*self.shape[: self.share.dim], self.share.whole, *self.shape[self.share.dim + 1 :])

    @property
    def global_shape(self) -> tuple[int, ...]:
        return self.local_shape if self.shard is None else self.shard.shape

    @property
    def local_offsets(self) -> tuple[int, ...]:
        """Where what this rank trains begins in the whole tensor."""
        return (0,) * len(self.shape) if self.shard is None else self.shard.offsets

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where this part begins in the whole tensor."""
        found = list(self.local_offsets)
        if self.share is not None:
            found[self.share.dim] += self.share.begin
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        plain = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "offset": self.offset,
            "bytes": self.num_bytes,
            "device": self.device,
            "owned": self.owned,
        }
        if self.shard is not None:
            plain["shard"] = {name: list(getattr(self.shard, name)) for name in Shard.__slots__}
        if self.share is not None:
            plain["share"] = {name: getattr(self.share, name) for name in Share.__slots__}
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Leaf:
        shard = None
        if "shard" in plain:
            given = plain["shard"]
            numbers = {name: _counts(given[name]) for name in ("shape", "offsets", "mesh", "coordinate")}
            shard = Shard(placements=tuple(map(str, given["placements"])), **numbers)
        share = Share(*_counts([plain["share"][name] for name in Share.__slots__])) if "share" in plain else None
        (offset,) = _counts([plain["offset"]])
        shape = _counts(plain["shape"])
        leaf = cls(DTYPES[plain["dtype"]], shape, offset, str(plain["device"]), bool(plain["owned"]), shard, share)
        if leaf.num_bytes != plain["bytes"] or offset % ALIGNMENT:
            raise ValueError(f"{plain['bytes']} bytes at {offset} for {leaf.dtype} of shape {leaf.shape}")
        if shard and any(
            not 0 <= begin <= begin + length <= whole
            for begin, length, whole in zip(shard.offsets, leaf.shape, shard.shape, strict=True)
            if length
        ):
            raise ValueError(f"a part of shape {leaf.shape} at {shard.offsets} of a tensor of shape {shard.shape}")
        if share and not (share.dim < len(shape) and share.begin + shape[share.dim] <= share.whole):
            raise ValueError(f"a part of shape {leaf.shape} is no share as {share}")
        return leaf


def _counts(numbers: list[Any]) -> tuple[int, ...]:
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{numbers} are no counts")
    return tuple(numbers)
