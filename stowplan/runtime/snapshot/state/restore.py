"""A training back from raw bytes: of this rank alone for the same world size, of all ranks for another one."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.futures import Future

from stowplan.core.errors import InvalidArgument, InvalidSnapshot, SnapshotMismatch
from stowplan.runtime.snapshot.state.contents import Contents, Piece
from stowplan.runtime.snapshot.state.fitting import Fitting
from stowplan.runtime.snapshot.state.leaf import Leaf
from stowplan.runtime.snapshot.state.parts import Parts, part_of
from stowplan.runtime.snapshot.state.training_state import TrainingState, bits, check_rng, set_rng

__all__ = ["MemoryReader", "Restored", "load_tensors", "reshard", "restore"]


@dataclass(frozen=True, slots=True)
class Restored:
    """What cannot be put back in place.

    Attributes:
        step: how many steps were done.
        extras: the values that were snapshotted as extras; those that could be set in place have been.
        exact: whether random generators and data are as they were: at the same world size.
        data: positions in the data of all ranks there were, by rank and then by name: what to make new ones of, at
            another world size. At the same one, this rank's only.
    """

    step: int
    extras: dict[str, Any]
    exact: bool
    data: list[dict[str, Any]]
    _rng: dict[str, Any]

    def set_rng(self) -> None:
        """Set random generators again, after something drew from them that was there before: a DataLoader's iterator.

        Iterators of torchdata's StatefulDataLoader are made, and generators set, before ``restore`` returns. Nothing is
        set at another world size.
        """
        if self.exact:
            set_rng(self._rng)


def restore(
    schema: dict[str, Any] | bytes | str, buffer: Any, into: TrainingState, others: Sequence[Piece] = ()
) -> Restored:
    """Put a snapshot of this rank back into a training of the same world size, to the last bit.

    Model and optimizer tensors are copied out of the buffer in place; random generators are set last. The buffer is
    only read, and may go afterwards.

    Args:
        schema: as ``flatten`` gave it, or its JSON.
        buffer: at least as many bytes as the schema says, contiguous.
        into: a training built as the first one was; its optimizer need not have any states.
        others: the pieces of ranks that have the rest of what is replicated (``gathered.restore_shares`` brings them).

    Raises:
        InvalidSnapshot: a schema is damaged, or of what is replicated a part is in no piece.
        SnapshotMismatch: the snapshot is of another training, rank or world size; nothing has been changed.
    """
    contents = Contents.of(Piece(schema, buffer))
    rank, world_size = _place()
    fitting = _fitted(into, [contents], contents, same_world=True)
    rng = contents.own("rng")
    if (contents.rank, contents.world_size) != (rank, world_size):
        fitting.problems.insert(
            0,
            f"it is of rank {contents.rank} of {contents.world_size}, and this is rank {rank} of {world_size} (use "
            f"reshard for another number of ranks)",
        )
    fitting.problems += _rng_problems(rng)
    fitting.check()
    parts = Parts(contents, [Contents.of(other) for other in others])
    copies = [(parts.of(name, leaf), tensor) for name, leaf, tensor in fitting.copies]

    def copy_tensors() -> None:
        for found, tensor in copies:
            local = bits(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
            for source, leaf in found:
                bits(part_of(local, leaf)).copy_(bits(source.decoder.view(leaf)))

    fitting.apply(copy_tensors)
    _make_iterators(into)
    set_rng(rng)
    return Restored(contents.step, fitting.extras, True, [contents.own("data")], rng)


def reshard(pieces: Sequence[Piece], into: TrainingState, reader: StorageReader | None = None) -> Restored:
    """Put the snapshots of all ranks into a training of any world size; every rank of the new one calls it.

    Models and optimizers are the same to the last bit, however they were and are sharded. Scheduler, scaler and extras
    are those of the old rank with this rank's number (modulo the old world size). Random generators and the position in
    the data have no meaning at another world size: they are left alone unless it is the same.

    Args:
        pieces: one for each old rank, in any order.
        into: a training of the same models and optimizers.
        reader: where the tensors of models and optimizers are read. Default: the pieces' buffers.

    Raises:
        InvalidArgument: a rank's piece is missing or there twice, or they are not of one step.
        InvalidSnapshot: a schema is damaged; together the pieces lack parts of a tensor.
        SnapshotMismatch: the snapshot is of another training; nothing has been changed.
    """
    sources = sorted((Contents.of(piece) for piece in pieces), key=lambda contents: contents.rank)
    ranks = [contents.rank for contents in sources]
    if not sources or ranks != list(range(sources[0].world_size)) or len({(s.world_size, s.step) for s in sources}) > 1:
        found = ", ".join(f"rank {s.rank} of {s.world_size} at step {s.step}" for s in sources) or "none"
        raise InvalidArgument(f"the pieces are {found}: give one of each rank, all of one step.")
    rank, world_size = _place()
    own, same_world = sources[rank % len(sources)], world_size == len(sources)
    fitting = _fitted(into, sources, own, same_world=False)
    rng = own.own("rng")
    if same_world:
        fitting.restore_data(own)
        fitting.problems += _rng_problems(rng)
    fitting.check()
    reader = reader or MemoryReader(sources)
    _refuse_gaps(reader.read_metadata(), [name for name, _, _ in fitting.copies])
    fitting.apply(lambda: load_tensors({name: tensor for name, _, tensor in fitting.copies}, reader))
    if same_world:
        _make_iterators(into)
        set_rng(rng)
    return Restored(own.step, fitting.extras, same_world, [source.own("data") for source in sources], rng)


def load_tensors(tensors: dict[str, torch.Tensor], reader: StorageReader) -> None:
    """Fill live tensors (DTensors: this rank's part) by their names; each rank for itself."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(dict(tensors), storage_reader=reader, planner=planner, no_dist=True)


class MemoryReader(StorageReader):
    """All ranks' snapshots as one checkpoint of torch, read out of their buffers."""

    def __init__(self, sources: Sequence[Contents]) -> None:
        self._chunks: dict[tuple[str, tuple[int, ...]], tuple[Contents, Leaf]] = {}
        families: dict[tuple[str, tuple[int, ...]], int | None] = {}
        for source in sources:
            for name, leaf in source.shared_leaves().items():
                family = leaf.share.family if leaf.share else None
                if families.setdefault((name, leaf.local_offsets), family) != family:
                    continue  # other ranks' own under the same name
                kept = self._chunks.get((name, leaf.offsets))
                if kept is None or not kept[1].num_bytes:
                    self._chunks[name, leaf.offsets] = source, leaf

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to forget."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Shapes, dtypes and parts of all tensors.

        Raises:
            InvalidSnapshot: ranks disagree about a tensor.
        """
        tensors: dict[str, TensorStorageMetadata] = {}
        for (name, offsets), (source, leaf) in self._chunks.items():
            entry = tensors.setdefault(
                name, TensorStorageMetadata(TensorProperties(leaf.dtype), torch.Size(leaf.global_shape), [])
            )
            if (entry.properties.dtype, tuple(entry.size)) != (leaf.dtype, leaf.global_shape):
                raise InvalidSnapshot(
                    f"{name} is {leaf.dtype} of shape {leaf.global_shape} on rank {source.rank}, and something else on "
                    f"another: the snapshots are not of one training."
                )
            if leaf.num_bytes or leaf.shape == leaf.global_shape:
                entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(leaf.shape)))
        return Metadata(dict(tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what the plan asks for, bit by bit."""
        for item in plan.items:
            index: MetadataIndex = item.storage_index
            source, leaf = self._chunks[index.fqn, tuple(index.offset or ())]
            part = source.decoder.view(leaf)
            for dim, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, begin, length)
            target = planner.resolve_tensor(item)
            bits(target).copy_(bits(part))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[Any]) -> bool:
        """Pieces have no name."""
        return False


def _make_iterators(into: TrainingState) -> None:
    """Let torchdata's loaders make their iterators now, as ``state_dict`` does: that draws random numbers.

    The next ``iter`` gives the same one, or after the end of an epoch another one, which draws as it always does.
    """
    for things in into.stateful()["data"].values():
        things.state_dict()


def _place() -> tuple[int, int]:
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)


def _fitted(into: TrainingState, sources: list[Contents], own: Contents, same_world: bool) -> Fitting:
    """Nothing has been changed when this fails, whatever is wrong with a schema that is JSON and no snapshot."""
    try:
        return Fitting(into, sources, own, same_world)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise InvalidSnapshot(
            f"the schema does not describe a training: {type(error).__name__}: {error}. It is damaged; go on from "
            f"another snapshot."
        ) from error


def _rng_problems(rng: dict[str, Any]) -> list[str]:
    states = rng.get("cuda")
    num_devices = torch.cuda.device_count() if states else 0
    if not isinstance(states, list) or len(states) == num_devices:
        check_rng(rng)
        return []
    return [f"it has random generators of {len(rng['cuda'])} CUDA devices, and {num_devices} are here"]


def _refuse_gaps(metadata: Metadata, names: Sequence[str]) -> None:
    """Refuses tensors of which a part is in no piece: torch would leave it as it is, without a word."""
    for name in names:
        entry = metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise SnapshotMismatch([f"{name} is missing in the snapshot"])
        held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if held != math.prod(entry.size):
            raise InvalidSnapshot(
                f"of {name}, {held} of {math.prod(entry.size)} elements are there. A rank's part is missing; go on "
                f"from another snapshot."
            )
