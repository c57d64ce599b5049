"""One rank's part of a copy on disk, by torch.distributed.checkpoint's writer, and what all parts are together."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from stowplan.core.errors import InvalidSnapshot
from stowplan.runtime.snapshot.state.contents import Contents, leaves_of
from stowplan.runtime.snapshot.state.leaf import Leaf
from stowplan.runtime.snapshot.state.state_schema import load_schema

__all__ = ["own_name", "part_name", "write_files", "write_metadata"]


def write_files(folder: Path, contents: Contents, stopped: Callable[[], str]) -> list[dict[str, Any]]:
    """Write what a rank's part has, synced; what lies where.

    Raises OSError, RuntimeError: a fault of the disk; InvalidSnapshot: ``stopped`` says why, between tensors or after.
    """
    entries = dict(_entries(contents))
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    writer.set_up_storage_writer(True, rank=contents.rank, use_collectives=False)
    plan = writer.prepare_local_plan(SavePlan([_write_item(name, entry) for name, entry in entries.items()]))
    results = writer.write_data(plan, _Resolver(contents, entries, stopped)).value()
    _check(stopped)
    return [_item(result, entries[result.index.fqn]) for result in results]


def own_name(rank: int, leaf: Leaf) -> str:
    """The name on disk of a tensor that a rank has for itself: in its random generators, its data, its extras."""
    return f"ranks.{rank}.{leaf.offset}"


def part_name(rank: int) -> str:
    """The file with a rank's schema."""
    return f"rank_{rank:05}.json"


def _entries(contents: Contents) -> Iterator[tuple[str, Any]]:
    """Everything that this rank writes, by its name on disk: leaves, and values of the optimizers."""
    chosen = {name: leaf for name, leaf in contents.shared_leaves().items() if leaf.owned}
    for name, leaf in chosen.items():
        if leaf.num_bytes or leaf.shape == leaf.global_shape:
            yield name, leaf
    owned = {name for name, leaf in contents.model.items() if isinstance(leaf, Leaf) and leaf.owned}
    for name, state in contents.states.items():
        if name in owned:
            yield from _values(state, f"optimizer.state.{name}")
    for group in contents.groups:
        options = {key: value for key, value in group.items() if key != "params"}
        for name in owned.intersection(group["params"]):
            for key, value in options.items():
                yield f"optimizer.param_groups.{name}.{key}", value
    for leaf in contents.own_leaves():
        yield own_name(contents.rank, leaf), leaf


def _values(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, member in tree.items():
            yield from _values(member, f"{path}.{key}")
    elif not any(leaves_of(tree, path)):
        yield path, tree


class _Resolver(SavePlanner):
    """Hands bytes of a buffer to torch's writer, without a copy."""

    def __init__(self, contents: Contents, entries: Mapping[str, Any], stopped: Callable[[], str]) -> None:
        self._contents, self._entries, self._stopped = contents, entries, stopped

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(name, entry) for name, entry in self._entries.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The bytes of an item."""
        _check(self._stopped)
        entry = self._entries[write_item.index.fqn]
        if isinstance(entry, Leaf):
            return self._contents.decoder.view(entry)
        stream = io.BytesIO()
        torch.save(entry, stream)
        stream.seek(0)
        return stream


def _check(stopped: Callable[[], str]) -> None:
    if reason := stopped():
        raise InvalidSnapshot(reason)


def _write_item(name: str, entry: Any) -> WriteItem:
    if not isinstance(entry, Leaf):
        return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)
    chunk = ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(entry.shape))
    data = TensorWriteData(chunk, TensorProperties(entry.dtype), torch.Size(entry.global_shape))
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _item(result: WriteResult, entry: Any) -> dict[str, Any]:
    where = result.storage_data
    item = {"name": result.index.fqn, "file": where.relative_path, "offset": where.offset, "length": where.length}
    return {**item, "leaf": entry.to_json()} if isinstance(entry, Leaf) else item


def write_metadata(folder: Path, parts: list[dict[str, Any]], world_size: int, step: int) -> None:
    """Torch's ``.metadata`` of all ranks' parts. Raises InvalidSnapshot: they are not of one snapshot."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensors: dict[str, Any] = {}
    results = []
    for rank, part in enumerate(parts):
        schema = load_schema(part["schema"])
        if (schema["rank"], schema["world_size"], schema["step"]) != (rank, world_size, step):
            raise InvalidSnapshot(
                f"{folder / part_name(rank)} is of rank {schema['rank']} of {schema['world_size']} at step "
                f"{schema['step']}. Delete the directory; it is no part of a copy of {world_size} ranks."
            )
        for item in part["items"]:
            where = _StorageInfo(item["file"], item["offset"], item["length"])
            index = MetadataIndex(item["name"])
            if "leaf" in item:
                leaf = Leaf.from_json(item["leaf"])
                index = MetadataIndex(item["name"], torch.Size(leaf.offsets))
                entry = tensors.setdefault(
                    item["name"],
                    TensorStorageMetadata(TensorProperties(leaf.dtype), torch.Size(leaf.global_shape), []),
                )
                if all(chunk.offsets != torch.Size(leaf.offsets) for chunk in entry.chunks):
                    entry.chunks.append(ChunkStorageMetadata(torch.Size(leaf.offsets), torch.Size(leaf.shape)))
            else:
                tensors[item["name"]] = BytesStorageMetadata()
            results.append(WriteResult(index, item["length"], where))
    FileSystemWriter(folder, sync_files=True).finish(Metadata(tensors), [results])
