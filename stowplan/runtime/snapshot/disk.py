"""Snapshots on disk, as checkpoints that ``torch.distributed.checkpoint.load`` reads without stowplan.

    directory/
      step_000000000120/              complete, and never changed again
        .metadata                     torch's, of all ranks together
        __0_0.distcp  __1_0.distcp    each rank's tensors and values
        rank_00000.json               each rank's schema, and what it wrote where
        COMPLETE                      JSON: step, world size, bytes and CRC-32C of every file
      step_000000000240.partial-1/    being written; 1 is the attempt

A rank's JSON comes last, written under another name, synced and renamed: so a part is there or it is not.
The process with rank 0's part waits for the others, writes ``.metadata`` and COMPLETE, syncs, and renames it all.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
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
from stowplan.runtime.snapshot.codes import crc32c
from stowplan.runtime.snapshot.contents import Contents, Piece, leaves_of
from stowplan.runtime.snapshot.fail_points import fail_at
from stowplan.runtime.snapshot.leaf import Leaf
from stowplan.runtime.snapshot.state_schema import dump_schema, load_schema

__all__ = [
    "COMPLETE",
    "copy_path",
    "finish",
    "good_copies",
    "newest_complete",
    "own_name",
    "part_name",
    "prune",
    "step_of",
    "verify",
    "write_part",
]

COMPLETE = "COMPLETE"
_NAME = re.compile(r"step_(\d{12})")
_BLOCK = 4 << 20


def write_part(
    directory: str | Path, piece: Piece, *, attempt: int = 0, overtaken: Callable[[], bool] = lambda: False
) -> int:
    """Write one rank's part of a snapshot; what other ranks write is left out. Gives the bytes written.

    Args:
        directory: the same for all ranks, on a file system that all nodes share.
        piece: the buffer must not change meanwhile.
        attempt: of the job; parts of different attempts are never put together.
        overtaken: asked when all has been read; whether the buffer has changed meanwhile, so that this is no part.

    Raises:
        OSError, RuntimeError: a full disk, or another fault of it (torch tells some as RuntimeError). There is no
            part then, and what was written of it is deleted.
        InvalidSnapshot: the schema is damaged, or it was overtaken.
    """
    contents = Contents.of(piece)
    folder = _partial(Path(directory), contents.step, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    entries = dict(_entries(contents))
    (folder / part_name(contents.rank)).unlink(missing_ok=True)
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    writer.set_up_storage_writer(True, rank=contents.rank, use_collectives=False)
    plan = writer.prepare_local_plan(SavePlan([_write_item(name, entry) for name, entry in entries.items()]))
    try:
        fail_at("disk.part")
        results = writer.write_data(plan, _Resolver(contents, entries)).value()
        if overtaken():
            raise InvalidSnapshot("its memory was needed for the next snapshot before it was written.")
    except BaseException:
        for file in folder.glob(f"__{contents.rank}_*"):  # a full disk needs its room
            file.unlink(missing_ok=True)
        raise
    part: dict[str, Any] = {
        "schema": load_schema(piece.schema),
        "items": [_item(result, entries[result.index.fqn]) for result in results],
        "files": {name: _checksum(folder / name) for name in sorted({r.storage_data.relative_path for r in results})},
    }
    _write_file(folder / part_name(contents.rank), dump_schema(part))
    return sum(size for size, _ in part["files"].values())


def finish(directory: str | Path, step: int, world_size: int, *, attempt: int = 0) -> Path | None:
    """Make a snapshot complete if all ranks' parts are there. One process asks: the one that wrote rank 0's part.

    A good copy of the same step that is there already stays as it is.

    Returns:
        The directory of the complete copy; None while parts are missing.

    Raises:
        OSError: a fault of the disk.
        InvalidSnapshot: the parts are not of one snapshot.
    """
    final, folder = copy_path(directory, step), _partial(Path(directory), step, attempt)
    if _is_good(final):
        return final
    names = [part_name(rank) for rank in range(world_size)]
    if not all((folder / name).exists() for name in names):
        return None
    fail_at("disk.finish")
    parts = [json.loads((folder / name).read_bytes()) for name in names]
    files = {name: entry for part in parts for name, entry in part["files"].items()}
    _write_metadata(folder, parts, world_size, step)
    files |= {name: _checksum(folder / name) for name in (".metadata", *names)}
    marker = {"step": step, "world_size": world_size, "attempt": attempt, "files": files}
    _write_file(folder / COMPLETE, dump_schema(marker))
    if final.exists():
        shutil.rmtree(final)
    folder.rename(final)
    _sync(Path(directory))
    return final


def copy_path(directory: str | Path, step: int) -> Path:
    """Where the complete copy of a step is, or will be."""
    return Path(directory) / f"step_{step:012}"


def step_of(copy: Path) -> int:
    """The step that a complete copy, by the name of its directory, is of."""
    return int(copy.name.removeprefix("step_"))


def good_copies(directory: str | Path) -> list[Path]:
    """Complete copies of which every file has its full length, oldest first."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name) and _is_good(path))


def newest_complete(directory: str | Path) -> Path | None:
    """The newest good copy; None if there is none. ``verify`` compares its bytes, too."""
    return next(reversed(good_copies(directory)), None)


def _is_good(path: Path) -> bool:
    try:
        files = json.loads((path / COMPLETE).read_bytes())["files"]
        return all((path / name).stat().st_size == size for name, (size, _) in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def verify(path: str | Path) -> None:
    """Read a copy and compare every checksum.

    Raises:
        InvalidSnapshot: the copy is not complete or damaged; names the files.
    """
    path = Path(path)
    try:
        files = json.loads((path / COMPLETE).read_bytes())["files"]
        wrong = [name for name, entry in files.items() if not (path / name).exists() or _checksum(path / name) != entry]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidSnapshot(f"{path} is no complete copy: {error}. Take an older one.") from error
    if wrong:
        raise InvalidSnapshot(f"{path}: {', '.join(wrong)} cannot be what was written. Take an older copy.")


def prune(directory: str | Path, keep: int, *, attempt: int = 0) -> list[Path]:
    """Delete all but the last ``keep`` good copies (at least one stays), and what cannot become complete any more.

    A copy that is damaged counts for nothing, and goes when it is older than the oldest that stays.
    """
    good = good_copies(directory)
    oldest = good[-max(keep, 1) :][:1]
    dead = []
    for path in Path(directory).glob("step_*"):
        step, partial, other = path.name.partition(".partial-")
        if partial:
            stale = other.isdigit() and int(other) < attempt
            if stale or (good and step <= good[-1].name):
                dead.append(path)
        elif _NAME.fullmatch(step) and oldest and step < oldest[0].name:
            dead.append(path)
    for path in dead:
        (path / COMPLETE).unlink(missing_ok=True)  # first: half a copy is none
        shutil.rmtree(path, ignore_errors=True)
    return dead


def own_name(rank: int, leaf: Leaf) -> str:
    """The name on disk of a tensor that a rank has for itself: in its random generators, its data, its extras."""
    return f"ranks.{rank}.{leaf.offset}"


# ---- what a part is made of ------------------------------------------------------------------------------------------
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

    def __init__(self, contents: Contents, entries: Mapping[str, Any]) -> None:
        self._contents, self._entries = contents, entries

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
        entry = self._entries[write_item.index.fqn]
        if isinstance(entry, Leaf):
            return self._contents.decoder.view(entry)
        stream = io.BytesIO()
        torch.save(entry, stream)
        stream.seek(0)
        return stream


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


def _write_metadata(folder: Path, parts: list[dict[str, Any]], world_size: int, step: int) -> None:
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


def _partial(directory: Path, step: int, attempt: int) -> Path:
    return directory / f"step_{step:012}.partial-{attempt}"


def part_name(rank: int) -> str:
    """The file with a rank's schema."""
    return f"rank_{rank:05}.json"


def _write_file(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> list[int]:
    """Bytes and CRC-32C of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), crc32c(block, crc)
    return [size, crc]
