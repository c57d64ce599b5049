"""A packing problem as CSV, in minimalloc's columns: ``id,lower,upper,size``, and ``offset`` where it is solved.

docs/pack_file.md has the rules. What is read may be hostile or broken: lines, rows and bytes are bounded while they
are read, and whatever cannot be is told with its line and column.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from stowplan.core.errors import InvalidArgument, InvalidProblemFile
from stowplan.planner.packing.problem import FREE, Integers, Problem
from stowplan.planner.packing.segments import Segments

__all__ = ["ProblemFile", "load_problem", "read_problem", "to_csv"]

_NEEDED = ("id", "lower", "upper", "size")
_KNOWN = (*_NEEDED, "offset", "alignment", "kind", "segment")
_MOST_LINE_BYTES = 2**17  # the longest field that the csv module reads by default
_MOST_BYTES = 2**30
_MOST_BUFFERS = 2_000_000
_MOST_LINES = 2 * _MOST_BUFFERS  # blank ones are counted here
_MOST_TIME = 2**62  # either way: the longest lifetime is a number of 64 bits, too
_MOST_SIZE = 2**60
_BOM = b"\xef\xbb\xbf"
_INTEGER = re.compile(r"[+-]?\d{1,19}", re.ASCII)
_MOST_ID = 400  # characters: they come back in messages
_SHOWN = 40  # characters of a bad cell


@dataclass(frozen=True, eq=False)
class ProblemFile:
    """What one file says: the problem, and all that goes back into the solved file.

    ``kinds`` are the cells of the column ``kind``, one a buffer, None where there is no such column. ``segments`` are
    the time ranges of the labels in the column ``segment``. ``lines`` are the rows as they were, blank ones left out.
    """

    problem: Problem
    header: tuple[str, ...]
    lines: Sequence[str] = field(repr=False)
    kinds: tuple[str, ...] | None = field(default=None, repr=False)
    segments: Segments | None = None


def load_problem(path: str | os.PathLike[str], *, alignment: int = 1, keep_offsets: bool = False) -> ProblemFile:
    """``read_problem`` of a file. Raises FileNotFoundError and its like, too."""
    with Path(path).open("rb") as stream:
        return read_problem(stream, str(path), alignment=alignment, keep_offsets=keep_offsets)


def read_problem(
    stream: BinaryIO, source: str, *, alignment: int = 1, keep_offsets: bool = False, with_segments: bool = False
) -> ProblemFile:
    """The problem that ``stream`` (CSV in UTF-8) poses; offsets are to be multiples of ``alignment`` bytes.

    ``source`` names the stream in messages. A column ``offset`` is ignored, or with ``keep_offsets`` fixes the buffers
    that have a number there; a column ``segment`` is ignored, too, without ``with_segments``. Raises InvalidProblemFile
    with line and column, InvalidArgument for an alignment that is not positive.
    """
    if alignment < 1:
        raise InvalidArgument(f"alignment={alignment}: give a positive number of bytes.")
    rows = _rows(stream, source)
    table = _Table(source, *next(rows, (1, "")), alignment)
    for number, line in rows:
        table.add(number, line)
    return table.finished(keep_offsets, with_segments)


def to_csv(file: ProblemFile, offsets: Integers) -> str:
    """The file with ``offsets``, int64 [n], in a column ``offset``: the last one, if there was none before."""
    place = _names(file.header).index("offset") if "offset" in _names(file.header) else len(file.header)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*file.header[:place], "offset", *file.header[place + 1 :]])
    for line, offset in zip(file.lines, offsets.tolist(), strict=True):
        cells = _cells(line)
        writer.writerow([*cells[:place], offset, *cells[place + 1 :]])
    return text.getvalue()


# ---- lines and cells -------------------------------------------------------------------------------------------------


def _rows(stream: BinaryIO, source: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1; never more than one of them in memory."""
    number = num_bytes = 0
    while line := stream.readline(_MOST_LINE_BYTES + 1):
        number, num_bytes = number + 1, num_bytes + len(line)
        if len(line) > _MOST_LINE_BYTES:
            _refuse(source, number, f"is longer than {_MOST_LINE_BYTES} bytes, the most a line may have")
        if num_bytes > _MOST_BYTES:
            _refuse(source, number, f"is beyond the first {_MOST_BYTES} bytes, the most a file may have")
        if number > _MOST_LINES:
            _refuse(source, number, f"is beyond the first {_MOST_LINES} lines, the most a file may have")
        if number == 1:
            line = line.removeprefix(_BOM)
        if b"\0" in line:
            _refuse(source, number, "has a NUL byte; allowed: CSV as UTF-8 text, not UTF-16 and nothing binary")
        try:
            text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            _refuse(source, number, f"is not UTF-8 text: {error.reason} at byte {error.start + 1}")
        if "\r" in text:
            _refuse(source, number, "has a carriage return inside; allowed: lines that end with LF or CR LF")
        if text.strip():
            yield number, text


def _cells(line: str) -> list[str]:
    """The cells of one line. Raises csv.Error for quotes that are not closed, or not at the edges of a cell."""
    return next(csv.reader([line], strict=True)) if '"' in line else line.split(",")


def _refuse(source: str, number: int, why: str, column: str | None = None) -> NoReturn:
    place = f"{source}, line {number}" + (f", column {column!r}" if column is not None else "")
    raise InvalidProblemFile(f"{place}: {why}." if column is not None else f"{place} {why}.")


def _names(header: Sequence[str]) -> list[str]:
    return [cell.strip().lower() for cell in header]


def _shown(cell: str) -> str:
    return repr(cell if len(cell) <= _SHOWN else cell[: _SHOWN - 3] + "...")


# ---- rows ------------------------------------------------------------------------------------------------------------


class _Table:
    """Rows checked one by one, as columns."""

    def __init__(self, source: str, number: int, header: str, alignment: int) -> None:
        self._source = source
        self._alignment = alignment
        self._header = self._split(number, header)
        names = _names(self._header)
        missing = [name for name in _NEEDED if name not in names]
        if missing:
            found = _shown(header) if header else "nothing"
            self._refuse(
                number,
                f"lacks {', '.join(missing)}; allowed: names of columns, {', '.join(_NEEDED)} among them, in any "
                f"order. Given: {found}",
            )
        for name in _KNOWN:
            if names.count(name) > 1:
                self._refuse(number, f"names the column {name!r} {names.count(name)} times; allowed: once")
        self._column = {name: names.index(name) for name in _KNOWN if name in names}
        self._lines: list[str] = []
        self._numbers: dict[str, int] = {}  # of an id's line
        self._values: dict[str, list[int]] = {"lower": [], "upper": [], "size": [], "offset": []}
        self._kinds: list[str] = []
        self._segments: dict[str, tuple[int, int]] = {}

    def add(self, number: int, line: str) -> None:
        """One more row. Raises InvalidProblemFile."""
        if len(self._lines) == _MOST_BUFFERS:
            self._refuse(number, f"is one buffer more than {_MOST_BUFFERS}, the most a file may have")
        cells = self._split(number, line)
        if len(cells) != len(self._header):
            self._refuse(number, f"has {_count(len(cells), 'cell')} for {_count(len(self._header), 'column')}")
        values = {name: cells[column] for name, column in self._column.items()}
        self._add_id(number, values["id"])
        lower = self._integer(number, "lower", values, -_MOST_TIME, _MOST_TIME, "a whole number")
        upper = self._integer(number, "upper", values, -_MOST_TIME, _MOST_TIME, "a whole number")
        if upper <= lower:
            self._refuse(number, f"{upper} is not above lower, {lower}: the lifetime [lower, upper) is empty", "upper")
        size = self._integer(number, "size", values, 1, _MOST_SIZE, "a whole number of bytes")
        if values.get("alignment", "").strip():
            self._check_alignment(number, values)
        offset = FREE
        if values.get("offset", "").strip():
            offset = self._integer(number, "offset", values, 0, _MOST_SIZE, "nothing, or a whole number of bytes")
        for name, value in (("lower", lower), ("upper", upper), ("size", size), ("offset", offset)):
            self._values[name].append(value)
        if "kind" in values:
            self._kinds.append(values["kind"].strip())
        label = values.get("segment", "").strip()
        if label:
            first, last = self._segments.get(label, (lower, upper))
            self._segments[label] = (min(first, lower), max(last, upper))
        self._lines.append(line)

    def finished(self, keep_offsets: bool, with_segments: bool) -> ProblemFile:
        """All rows as a problem. Raises InvalidProblemFile for what only all rows together show."""
        columns = {name: np.array(values, dtype=np.int64) for name, values in self._values.items()}
        fixed = columns["offset"] if keep_offsets and "offset" in self._column else None
        try:
            problem = Problem(
                lower=columns["lower"],
                upper=columns["upper"],
                size=columns["size"],
                alignment=self._alignment,
                fixed=fixed,
                names=tuple(self._numbers),
            )
        except InvalidArgument as error:
            raise InvalidProblemFile(f"{self._source}: {error}") from error
        return ProblemFile(
            problem=problem,
            header=tuple(self._header),
            lines=self._lines,
            kinds=tuple(self._kinds) if "kind" in self._column else None,
            segments=self._time_ranges() if with_segments and self._segments else None,
        )

    def _split(self, number: int, line: str) -> list[str]:
        try:
            return _cells(line)
        except csv.Error as error:
            self._refuse(number, f"is no row of CSV: {error}; a cell may not go on in the next line")

    def _add_id(self, number: int, name: str) -> None:
        if not name.strip() or len(name) > _MOST_ID:
            self._refuse(number, f"{_shown(name)}; allowed: any text of 1 to {_MOST_ID} characters", "id")
        other = self._numbers.setdefault(name, number)
        if other != number:
            self._refuse(number, f"{_shown(name)} is the id of line {other}, too; allowed: one id a buffer", "id")

    def _integer(self, number: int, column: str, values: dict[str, str], least: int, most: int, allowed: str) -> int:
        cell = values[column].strip()
        if _INTEGER.fullmatch(cell) is None or not least <= int(cell) <= most:
            self._refuse(number, f"{_shown(values[column])}; allowed: {allowed} from {least} to {most}", column)
        return int(cell)

    def _check_alignment(self, number: int, values: dict[str, str]) -> None:
        wanted = self._integer(number, "alignment", values, 1, _MOST_SIZE, "nothing, or a whole number of bytes")
        if self._alignment % wanted:
            why = (
                f"{wanted} does not divide the alignment of all buffers, {self._alignment}: pack with a multiple of it"
            )
            self._refuse(number, why, "alignment")

    def _time_ranges(self) -> Segments:
        ordered = sorted(self._segments.items(), key=lambda item: item[1])
        for (label, (_, upper)), (other, (lower, _)) in pairwise(ordered):
            if lower < upper:
                raise InvalidProblemFile(
                    f"{self._source}, column 'segment': {_shown(label)} lasts until {upper} and {_shown(other)} begins "
                    f"at {lower}; allowed: segments that follow each other. Leave the cell of a buffer that outlives "
                    f"its segment empty."
                )
        return tuple(times for _, times in ordered)

    def _refuse(self, number: int, why: str, column: str | None = None) -> NoReturn:
        _refuse(self._source, number, why, column)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
