"""Snapshots on disk, as checkpoints that ``torch.distributed.checkpoint.load`` reads without stowplan.

    directory/
      step_000000000120/              complete, and never changed again
        .metadata                     torch's, of all ranks together
        __0_0.distcp  __1_0.distcp    each rank's tensors and values
        rank_00000.json               each rank's schema, and what it wrote where
        COMPLETE                      JSON: step, world size, attempt, bytes and CRC-32C of every file
      step_000000000240.partial-1/    being written; 1 is the attempt

A rank's JSON comes last, written under another name, synced and renamed: so a part is there or it is not.
The process with rank 0's part waits for the others, writes ``.metadata`` and COMPLETE, syncs, and renames it all.

Note: which copy is the newest. A job that went back from step 500 to 100 and then wrote 110 goes on from 110. So copies
are in the order of the attempts that wrote them, and of one attempt in the order of steps. Each start of the job has a
higher attempt than all before, whatever was lost in between (``next_attempt``); an older one completes nothing more.
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
from stowplan.runtime.snapshot.disk.parts import own_name, part_name, write_files, write_metadata
from stowplan.runtime.snapshot.fail_points import fail_at
from stowplan.runtime.snapshot.state.contents import Contents, Piece
from stowplan.runtime.snapshot.state.state_schema import dump_schema, load_schema

__all__ = [
    "COMPLETE",
    "copy_path",
    "finish",
    "good_copies",
    "is_complete",
    "newest_complete",
    "next_attempt",
    "own_name",
    "part_name",
    "prune",
    "step_of",
    "verify",
    "write_part",
]

COMPLETE = "COMPLETE"
_NAME = re.compile(r"step_\d{12}")
_PARTIAL = re.compile(r"step_(\d{12})\.partial-(\d+)")
_BLOCK = 4 << 20


def write_part(
    directory: str | Path,
    piece: Piece,
    *,
    attempt: int = 0,
    stopped: Callable[[], str] = lambda: "",
    run: str = "",
) -> int:
    """Write one rank's part of a snapshot; what other ranks write is left out. Gives the bytes written.

    Args:
        directory: the same for all ranks, on a file system that all nodes share.
        piece: the buffer must not change meanwhile.
        attempt: of the job; parts of different attempts are never put together.
        run: the job's name; parts of different runs are never put together.
        stopped: asked before each tensor and when all has been read; why this is to be no part, as when the buffer has
            changed meanwhile. Empty: nothing is wrong.

    Raises:
        OSError, RuntimeError: a full disk, or another fault of it (torch tells some as RuntimeError). There is no
            part then, and what was written of it is deleted.
        InvalidSnapshot: the schema is damaged, or it was stopped.
    """
    contents = Contents.of(piece)
    folder = _partial(Path(directory), contents.step, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / part_name(contents.rank)).unlink(missing_ok=True)
    try:
        fail_at("disk.part")
        items = write_files(folder, contents, stopped)
    except BaseException:
        for file in folder.glob(f"__{contents.rank}_*"):  # a full disk needs its room
            file.unlink(missing_ok=True)
        raise
    part: dict[str, Any] = {
        "run": run,
        "schema": load_schema(piece.schema),
        "items": items,
        "files": {name: _checksum(folder / name) for name in sorted({item["file"] for item in items})},
    }
    _write_file(folder / part_name(contents.rank), dump_schema(part))
    return sum(size for size, _ in part["files"].values())


def finish(directory: str | Path, step: int, world_size: int, *, attempt: int = 0, run: str = "") -> Path | None:
    """Make a snapshot complete if all ranks' parts are there. One process asks: the one that wrote rank 0's part.

    A good copy of the same step and attempt that is there already stays as it is; one of an older attempt is replaced.

    Returns:
        The directory of the complete copy; None while parts are missing.

    Raises:
        OSError: a fault of the disk.
        InvalidSnapshot: the parts are not of one snapshot, or of another run, or there are good copies of another run
            or of a newer attempt.
    """
    final, folder = copy_path(directory, step), _partial(Path(directory), step, attempt)
    if is_complete(directory, step, attempt=attempt) and _is_good(final):
        return final
    names = [part_name(rank) for rank in range(world_size)]
    if not folder.is_dir() or not set(names).issubset(path.name for path in folder.iterdir()):
        return None
    newest = newest_complete(directory, run)
    if newest is not None and _order(newest)[0] > attempt:
        raise InvalidSnapshot(
            f"{newest} is of attempt {_order(newest)[0]}, and this is attempt {attempt}, an older one: end what is "
            f"left of it. Where it is the newest, start it with an attempt that next_attempt gives."
        )
    fail_at("disk.finish")
    parts = [json.loads((folder / name).read_bytes()) for name in names]
    for name, part in zip(names, parts, strict=True):
        _check_run(folder / name, part["run"], run)
    files = {name: entry for part in parts for name, entry in part["files"].items()}
    write_metadata(folder, parts, world_size, step)
    files |= {name: _checksum(folder / name) for name in (".metadata", *names)}
    marker = {"step": step, "world_size": world_size, "attempt": attempt, "run": run, "files": files}
    _write_file(folder / COMPLETE, dump_schema(marker))
    aside = _partial(Path(directory), step, min(_order(final)[0], attempt - 1))
    if final.exists():  # out of the way in one step, so that there is hardly a moment without either
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    folder.rename(final)
    _sync(Path(directory))
    shutil.rmtree(aside, ignore_errors=True)
    return final


def copy_path(directory: str | Path, step: int) -> Path:
    """Where the complete copy of a step is, or will be."""
    return Path(directory) / f"step_{step:012}"


def step_of(copy: Path) -> int:
    """The step that a complete copy, by the name of its directory, is of."""
    return int(copy.name.removeprefix("step_"))


def good_copies(directory: str | Path, run: str = "") -> list[Path]:
    """Complete copies of which every file has its full length, by attempt, and by step within an attempt.

    Raises InvalidSnapshot: one is of another run than ``run``; copies without a name, and no name here, are any run's.
    """
    good = sorted(filter(_is_good, _copies(Path(directory))), key=_order)
    for path in good:
        _check_run(path, _marker(path).get("run", ""), run)
    return good


def newest_complete(directory: str | Path, run: str = "") -> Path | None:
    """The newest good copy; None if there is none. ``verify`` compares its bytes, too. Raises as ``good_copies``."""
    return next(reversed(good_copies(directory, run)), None)


def is_complete(directory: str | Path, step: int, *, attempt: int = 0) -> bool:
    """Whether this attempt has completed the copy of this step: reads its COMPLETE, and nothing else."""
    return _order(copy_path(directory, step)) == (attempt, step)


def next_attempt(directory: str | Path, least: int = 1) -> int:
    """At least ``least``, and above every attempt that left anything here; ranks take the highest of all theirs."""
    directory = Path(directory)
    found = [_order(path)[0] for path in _copies(directory)]
    found += [int(match[2]) for path in directory.glob("step_*") if (match := _PARTIAL.fullmatch(path.name))]
    return max([least, *(attempt + 1 for attempt in found)])


def _copies(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name)]


def _order(path: Path) -> tuple[int, int]:
    """Attempt and step of a copy; before all others where that cannot be read."""
    marker = _marker(path)
    return marker.get("attempt", -1), marker.get("step", -1)


def _is_good(path: Path) -> bool:
    try:
        return all((path / name).stat().st_size == size for name, (size, _) in _marker(path)["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _marker(path: Path) -> dict[str, Any]:
    """What a copy's COMPLETE says; nothing where it cannot be read."""
    try:
        marker = json.loads((path / COMPLETE).read_bytes())
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _check_run(path: Path, found: str, run: str) -> None:
    if run and found and found != run:
        raise InvalidSnapshot(
            f"{path} is of run {found!r}, and this is run {run!r}: give each run a directory of its own. To go on with "
            f"what {found!r} wrote, start with run={found!r}, or restore that copy by restore_from_disk."
        )


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

    That is what older attempts did not complete, and what this one did not when it has completed a later step. A copy
    that is damaged counts for nothing, and goes when its step is before all that stay.
    """
    good = good_copies(directory)
    kept = good[-max(keep, 1) :]
    own = max((order for order in map(_order, kept) if order[0] == attempt), default=(attempt, -1))
    partials = [(path, _PARTIAL.fullmatch(path.name)) for path in Path(directory).glob("step_*")]
    dead = [path for path, match in partials if match and (int(match[2]), int(match[1])) <= own]
    for path in _copies(Path(directory)):
        if path not in kept and (path in good or (kept and path.name < min(kept).name)):
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
