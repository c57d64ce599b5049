from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowplan.core.errors import InvalidArgument, InvalidProblemFile
from stowplan.planner.packing import FREE
from stowplan.planner.packing.csv_file import ProblemFile, load_problem, read_problem, to_csv
from tests.planner.packing.problems import DSA, DSA_CAPACITY, DSA_NAMES, dsa

PLAIN = b"id,lower,upper,size\na,0,4,100\nb,2,6,50\nc,4,9,7\n"


def read(text: bytes | str, **options: Any) -> ProblemFile:
    given = text if isinstance(text, bytes) else text.encode()
    return read_problem(io.BytesIO(given), "in.csv", **options)


def refused(text: bytes | str, **options: Any) -> str:
    with pytest.raises(InvalidProblemFile) as caught:
        read(text, **options)
    message = str(caught.value)
    assert message.startswith("in.csv")
    assert len(message) < 1000
    return message


def rows_of(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


# ---- what can be read ------------------------------------------------------------------------------------------------


def test_the_four_columns() -> None:
    problem = read(PLAIN).problem
    assert problem.names == ("a", "b", "c")
    assert problem.lower.tolist() == [0, 2, 4]
    assert problem.upper.tolist() == [4, 6, 9]
    assert problem.size.tolist() == [100, 50, 7]
    assert problem.fixed is None


@pytest.mark.parametrize(
    "variant",
    [
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN.replace(b"\n", b"\r\n"),
        PLAIN.rstrip(),
        PLAIN.replace(b"\n", b"\n\n  \n"),
        PLAIN.replace(b"id,lower", b"ID, Lower "),
        PLAIN.replace(b"a,0,4,100", b'"a","0", +4 ,0100'),
    ],
    ids=["BOM", "CR LF", "no last line end", "blank lines", "capitals and spaces", "quotes, signs and zeros"],
)
def test_ways_to_write_the_same(variant: bytes) -> None:
    plain, other = read(PLAIN).problem, read(variant).problem
    assert other.names == plain.names
    for name in ("lower", "upper", "size"):
        np.testing.assert_array_equal(getattr(other, name), getattr(plain, name))


def test_columns_in_any_order_with_others_between() -> None:
    file = read("size,note,upper,id,lower\n5,hello,2,x,1\n")
    problem = file.problem
    assert (problem.names, problem.lower[0], problem.upper[0], problem.size[0]) == (("x",), 1, 2, 5)
    assert rows_of(to_csv(file, np.array([64]))) == [
        ["size", "note", "upper", "id", "lower", "offset"],
        ["5", "hello", "2", "x", "1", "64"],
    ]


def test_times_may_be_negative_and_large() -> None:
    problem = read(f"id,lower,upper,size\nx,{-(2**62)},{2**62},{2**60}\n").problem
    assert (problem.lower[0], problem.upper[0], problem.bound_bytes) == (-(2**62), 2**62, 2**60)


def test_a_header_alone_is_a_problem_without_buffers() -> None:
    file = read("id,lower,upper,size")
    assert len(file.problem) == 0
    assert to_csv(file, file.problem.lower) == "id,lower,upper,size,offset\n"


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "problem.csv"
    path.write_bytes(PLAIN)
    assert load_problem(path, alignment=64).problem.alignment == 64


# ---- offsets, kinds, segments, alignment -----------------------------------------------------------------------------

SOLVED = "id,offset,lower,upper,size\na,0,0,4,100\nb,100,2,6,50\nc,,4,9,7\n"


def test_offsets_are_ignored_unless_they_are_to_be_kept() -> None:
    assert read(SOLVED).problem.fixed is None
    fixed = read(SOLVED, keep_offsets=True).problem.fixed
    assert fixed is not None
    assert fixed.tolist() == [0, 100, FREE]
    assert read(PLAIN, keep_offsets=True).problem.fixed is None


def test_a_column_of_offsets_is_replaced_where_it_is() -> None:
    solved = rows_of(to_csv(read(SOLVED), np.array([1, 2, 3])))
    assert solved[0] == ["id", "offset", "lower", "upper", "size"]
    assert [row[1] for row in solved[1:]] == ["1", "2", "3"]


def test_kept_offsets_that_cannot_be() -> None:
    assert "no multiple of 64" in refused(SOLVED, keep_offsets=True, alignment=64)
    assert "column 'offset': '-1'" in refused(SOLVED.replace("b,100", "b,-1"))


def test_kinds_and_segments() -> None:
    text = "id,lower,upper,size,kind,segment\na,0,4,1,weights,\nb,0,2,1, act ,f0\nc,1,3,1,,f0\nd,3,4,1,act,f1\n"
    file = read(text, with_segments=True)
    assert file.kinds == ("weights", "act", "", "act")
    assert file.segments == ((0, 3), (3, 4))
    plain = read(PLAIN, with_segments=True)
    assert (plain.kinds, plain.segments) == (None, None)


def test_segments_that_overlap() -> None:
    text = "id,lower,upper,size,segment\na,0,4,1,f0\nb,3,5,1,f1\n"
    assert read(text).segments is None
    message = refused(text, with_segments=True)
    assert "column 'segment': 'f0' lasts until 4 and 'f1' begins at 3" in message


def test_an_alignment_of_one_buffer_must_divide_that_of_all() -> None:
    text = "id,lower,upper,size,alignment\na,0,4,1,16\nb,0,4,1,\n"
    assert read(text, alignment=64).problem.alignment == 64
    assert "line 2, column 'alignment': 16 does not divide" in refused(text, alignment=24)
    with pytest.raises(InvalidArgument, match="alignment=0"):
        read(text, alignment=0)


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("x,0,4", "line 3 has 3 cells for 4 columns"),
        ("x,0,4,1,1", "line 3 has 5 cells for 4 columns"),
        ("x,4,4,1", "column 'upper': 4 is not above lower, 4"),
        ("x,0,4,0", "column 'size': '0'; allowed: a whole number of bytes from 1"),
        ("x,0,4,-5", "column 'size': '-5'"),
        ("x,0,4,1.5", "column 'size': '1.5'"),
        ("x,0,4,1e6", "column 'size': '1e6'"),
        ("x,0,4,1_000", "column 'size': '1_000'"),
        ("x,0,4,", "column 'size': ''"),
        ("x,0,4,nan", "column 'size': 'nan'"),
        ("x,0,4,٣", "column 'size': '٣'"),
        (f"x,0,4,{2**63}", "column 'size'"),
        (f"x,0,4,{'9' * 5000}", f"column 'size': '{'9' * 37}...'"),
        (f"x,0,{2**62 + 1},1", "column 'upper'"),
        (f"x,{-(2**63)},1,1", "column 'lower'"),
        (",0,4,1", "column 'id': ''; allowed: any text of 1 to 400 characters"),
        (f"{'x' * 401},0,4,1", "column 'id'"),
        ("a,0,4,1", "column 'id': 'a' is the id of line 2, too"),
        ('"x,0,4,1', "is no row of CSV"),
        ('"x"y,0,4,1', "is no row of CSV"),
        ("x\r,0,4,1", "has a carriage return inside"),
        ("x\0,0,4,1", "has a NUL byte"),
    ],
)
def test_a_row_that_cannot_be_is_named(row: str, reason: str) -> None:
    message = refused(f"id,lower,upper,size\na,0,4,100\n{row}\nb,0,1,1\n")
    assert message.startswith("in.csv, line 3")
    assert reason in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "line 1 lacks id, lower, upper, size"),
        (b"\n\n", "line 1 lacks id"),
        (b"0,995328,1000448,656384\n", "lacks id, lower, upper, size"),
        (b"id,start,end,size\n", "lacks lower, upper; allowed: names of columns"),
        (b"id,lower,upper,size,Size\n", "names the column 'size' 2 times"),
        (PLAIN.decode().encode("utf-16"), "has a NUL byte; allowed: CSV as UTF-8 text, not UTF-16"),
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8 text: invalid start byte at byte 1"),
        (PLAIN + b"\xed\xb2\x80,0,1,1\n", "line 5 is not UTF-8 text"),
        (PLAIN.replace(b"\n", b"\r"), "line 1 has a carriage return inside"),
        (b"id,lower,upper,size\n" + b"x" * 200_000, "line 2 is longer than 131072 bytes"),
        (PLAIN + f"x,0,1,{2**60}\n".encode(), "add up to more than 2**60 bytes"),
    ],
)
def test_a_file_that_is_no_problem(text: bytes, reason: str) -> None:
    assert reason in refused(text)


class _Endless(io.RawIOBase):
    """A file that never ends, and counts what is read of it."""

    def __init__(self, pattern: bytes) -> None:
        self._pattern, self.num_read = pattern, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        piece = (self._pattern * (len(buffer) // len(self._pattern) + 1))[: len(buffer)]
        buffer[:] = piece
        self.num_read += len(piece)
        return len(piece)


@pytest.mark.parametrize("pattern", [b"x", b"\n", b'"', b'"\n', b"a,0,1,1\n", b"\0", b"\r\n"])
def test_a_file_without_an_end_is_left_early(pattern: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from stowplan.planner.packing import csv_file

    monkeypatch.setattr(csv_file, "_MOST_BYTES", 2**20)
    endless = _Endless(pattern)
    with pytest.raises(InvalidProblemFile):
        read_problem(io.BufferedReader(endless), "in.csv")
    assert endless.num_read < 2**21


def test_buffers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from stowplan.planner.packing import csv_file

    monkeypatch.setattr(csv_file, "_MOST_BUFFERS", 2)
    assert "line 4 is one buffer more than 2" in refused(PLAIN)


# ---- anything at all -------------------------------------------------------------------------------------------------

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=20)


@given(st.data())
@settings(deadline=None)
def test_what_is_written_reads_as_it_was(data: st.DataObject) -> None:
    ids = data.draw(st.lists(CELL.filter(str.strip), unique=True, max_size=8))
    extra = data.draw(st.lists(CELL, min_size=len(ids), max_size=len(ids)))
    times = st.integers(-(2**62), 2**62 - 1)
    lowers = data.draw(st.lists(times, min_size=len(ids), max_size=len(ids)))
    sizes = data.draw(st.lists(st.integers(1, 2**40), min_size=len(ids), max_size=len(ids)))
    offsets = np.array(data.draw(st.lists(st.integers(0, 2**40), min_size=len(ids), max_size=len(ids))), np.int64)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=data.draw(st.sampled_from(["\n", "\r\n"])))
    writer.writerow(["note", "size", "id", "upper", "lower"])
    for name, lower, size, note in zip(ids, lowers, sizes, extra, strict=True):
        writer.writerow([note, size, name, lower + 1, lower])
    first = read(text.getvalue())
    solved = to_csv(first, offsets)
    second = read(solved)
    assert second.problem.names == first.problem.names == tuple(ids)
    for name in ("lower", "upper", "size"):
        np.testing.assert_array_equal(getattr(second.problem, name), getattr(first.problem, name))
    assert first.problem.lower.tolist() == lowers
    assert [(row[0], row[-1]) for row in rows_of(solved)[1:]] == [
        (note, str(offset)) for note, offset in zip(extra, offsets.tolist(), strict=True)
    ]
    assert to_csv(second, offsets) == solved


def _read_or_refuse(text: bytes) -> None:
    """All that reading may do: give a problem that can be written, or refuse."""
    for keep_offsets in (False, True):
        try:
            file = read(text, keep_offsets=keep_offsets)
        except InvalidProblemFile:
            continue
        read(to_csv(file, np.zeros(len(file.problem), np.int64)))


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes(text: bytes) -> None:
    _read_or_refuse(text)
    _read_or_refuse(b"id,lower,upper,size,offset,segment\n" + text)


PIECES = [b",", b"\n", b"\r", b'"', b"\0", b"-", b"9" * 25, b"\xff", b"1e5", b"", b"\xef\xbb\xbf", b"=cmd()", b"id"]


@pytest.mark.parametrize("name", DSA_NAMES)
def test_files_of_minimalloc(name: str) -> None:
    file, expected = load_problem(DSA / f"{name}.{DSA_CAPACITY}.csv"), dsa(name)
    for column in ("lower", "upper", "size"):
        np.testing.assert_array_equal(getattr(file.problem, column), getattr(expected, column))
    assert file.problem.names == tuple(str(number) for number in range(len(expected)))


@given(st.sampled_from(DSA_NAMES), st.randoms(use_true_random=False), st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_damaged_files(name: str, chance: random.Random, num_damages: int) -> None:
    text = (DSA / f"{name}.{DSA_CAPACITY}.csv").read_bytes()
    for _ in range(num_damages):
        first = chance.randrange(len(text) + 1) if chance.random() < 0.7 else chance.randrange(30)
        last = min(len(text), first + chance.choice([0, 0, 1, 2, 40]))
        text = text[:first] + chance.choice(PIECES) + text[last:]
    _read_or_refuse(text)
