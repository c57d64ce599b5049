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

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stowplan.core.errors import InvalidSnapshot
from stowplan.runtime.snapshot.codes import crc32c
from stowplan.runtime.snapshot.contents import Contents, Piece
from stowplan.runtime.snapshot.disk_parts import own_name, part_name, write_files, write_metadata
from stowplan.runtime.snapshot.fail_points import fail_at
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
    (folder / part_name(contents.rank)).unlink(missing_ok=True)
    try:
        fail_at("disk.part")
        items = write_files(folder, contents)
        if overtaken():
            raise InvalidSnapshot("its memory was needed for the next snapshot before it was written.")
    except BaseException:
        for file in folder.glob(f"__{contents.rank}_*"):  # a full disk needs its room
            file.unlink(missing_ok=True)
        raise
    part: dict[str, Any] = {
        "schema": load_schema(piece.schema),
        "items": items,
        "files": {name: _checksum(folder / name) for name in sorted({item["file"] for item in items})},
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
    write_metadata(folder, parts, world_size, step)
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


def _partial(directory: Path, step: int, attempt: int) -> Path:
    return directory / f"step_{step:012}.partial-{attempt}"


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
