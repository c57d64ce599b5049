"""Files that commands read and write; ``-`` is stdin or stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import BinaryIO

import typer

from stowplan.core.errors import InvalidArgument

__all__ = ["STANDARD", "open_input", "refuse_missing_directory", "refuse_picture", "write_text"]

STANDARD = "-"
_PICTURES = (".html", ".svg")


@contextmanager
def open_input(name: str) -> Iterator[BinaryIO]:
    """A file's bytes, or those of stdin. Raises FileNotFoundError and its like; InvalidArgument for a closed stdin."""
    if name == STANDARD:
        if sys.stdin is None:
            raise InvalidArgument("- is stdin, which is closed: give a file.")
        yield typer.get_binary_stream("stdin")
    else:
        with Path(name).open("rb") as stream:
            yield stream


def refuse_missing_directory(out: str | Path | None, option: str = "--out") -> None:
    """Tell that a file cannot be written before the work for it is done. Raises InvalidArgument."""
    if out is None or out == STANDARD:
        return
    path = Path(out)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InvalidArgument(f"{option} {str(out)!r} cannot be written: give a file in a directory that exists.")


def refuse_picture(picture: str | None) -> None:
    """Tell that ``--picture`` cannot be written before the work for it is done. Raises InvalidArgument."""
    refuse_missing_directory(picture, "--picture")
    if picture is not None and PurePath(picture).suffix.lower() not in _PICTURES:
        raise InvalidArgument(f"--picture {picture!r}: allowed: a name that ends with {' or '.join(_PICTURES)}.")


def write_text(name: str, text: str) -> None:
    """``text`` as UTF-8: a file is replaced at once or not at all, what is no regular file (a pipe) is written to.

    Raises OSError that names the file.
    """
    if name == STANDARD:
        stream = typer.get_binary_stream("stdout")
        stream.write(text.encode("utf-8"))
        stream.flush()
        return
    path = Path(name)
    replaced = path.is_file() or not path.exists()
    draft = path.with_name(path.name + ".tmp") if replaced else path
    try:
        draft.write_text(text, encoding="utf-8", newline="")
        if replaced:
            draft.replace(path)
    except OSError as error:
        error.filename = name  # also where a write fails, which does not know of names
        if replaced and draft.is_file():
            draft.unlink()
        raise
