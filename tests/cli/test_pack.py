from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from stowplan.cli import app
from stowplan.cli.files import open_input
from stowplan.cli.progress import Tell, packing_progress
from stowplan.core.errors import InvalidArgument
from stowplan.core.native import compiled
from stowplan.planner.packing import library as packer
from stowplan.planner.packing import validate
from stowplan.planner.packing.csv_file import load_problem, to_csv
from stowplan.planner.packing.library import library
from tests.cli.commands import run, told
from tests.planner.packing.problems import DSA
from tests.planner.packing.traces import churn, layered

# Three alive together at most, 30 bytes of them: the least height is 30.
ROWS = """id,lower,upper,size,kind,note
w,0,9,10,weights,"kept, always"
a,0,4,20,activations,
b,4,8,15,activations,x
c,4,9,5,temporaries,y
"""


@pytest.fixture
def buffers(tmp_path: Path) -> Path:
    path = tmp_path / "buffers.csv"
    path.write_text(ROWS)
    return path


def solved(text: str) -> dict[str, int]:
    return {row["id"]: int(row["offset"]) for row in csv.DictReader(io.StringIO(text))}


# ---- results ---------------------------------------------------------------------------------------------------------


def test_the_result_is_one_screen(buffers: Path) -> None:
    result = run("pack", buffers)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "Packed: 4 buffers in 30 B, which is the least."
    figures = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[2:]}
    assert {name: figures[name] for name in ("buffers", "bound", "height", "gap", "capacity", "solver")} == {
        "buffers": "4",
        "bound": "30 B",
        "height": "30 B",
        "gap": "0.00%",
        "capacity": "none given",
        "solver": "auto",
    }
    assert set(figures) - {"buffers", "bound", "height", "gap", "capacity", "solver"} == {"file", "alignment", "time"}
    assert len(lines) < 24


@pytest.mark.parametrize("solver", ["auto", "greedy", "exact", "bilevel"])
def test_every_solver_gives_addresses_that_are_right(solver: str, tmp_path: Path) -> None:
    problem = layered(4)
    file, out = tmp_path / "in.csv", tmp_path / "out.csv"
    rows = zip(problem.lower.tolist(), problem.upper.tolist(), problem.size.tolist(), strict=True)
    body = "".join(f"{n},{lower},{upper},{size}\n" for n, (lower, upper, size) in enumerate(rows))
    file.write_text("id,lower,upper,size\n" + body)
    result = run("pack", file, "--solver", solver, "--alignment", "512", "--out", out, "--time-limit", "5")
    assert result.exit_code == 0, result.output
    offsets = load_problem(out, alignment=512, keep_offsets=True).problem.fixed
    assert offsets is not None
    assert validate(problem, offsets) is None
    assert f"solver      {solver}" in result.stdout
    assert f"height      {(offsets + problem.aligned_size).max():,} B" in result.stdout


def test_a_file_of_minimalloc_fits_its_capacity() -> None:
    result = run("pack", DSA / "B.1048576.csv", "--capacity", "1MiB", "--time-limit", "120")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Fits: 170 buffers in 1.00 MiB of 1.00 MiB, which is the least.")


def test_the_solved_file_has_all_that_was_there(buffers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert run("pack", buffers, "--out", out).exit_code == 0
    rows = list(csv.reader(io.StringIO(out.read_text())))
    given = list(csv.reader(io.StringIO(ROWS)))
    assert [row[:-1] for row in rows] == given
    assert rows[0][-1] == "offset"
    assert not (tmp_path / "out.csv.tmp").exists()
    again = tmp_path / "again.csv"
    assert run("pack", out, "--out", again, "--keep-offsets").exit_code == 0
    assert again.read_text() == out.read_text()


def test_a_file_may_be_its_own_answer(buffers: Path) -> None:
    assert run("pack", buffers, "--out", buffers).exit_code == 0
    assert set(solved(buffers.read_text())) == {"w", "a", "b", "c"}


def test_json_has_stdout_to_itself(buffers: Path) -> None:
    result = run("pack", buffers, "--json", "--capacity", "30", "--alignment", "5")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert [entry["id"] for entry in said["offsets"]] == ["w", "a", "b", "c"]
    offsets = np.array([entry["offset"] for entry in said["offsets"]])
    assert validate(load_problem(buffers, alignment=5).problem, offsets, 30) is None
    del said["offsets"], said["seconds"], said["solver"]
    assert said == {
        "file": str(buffers),
        "buffers": 4,
        "alignment": 5,
        "bound_bytes": 30,
        "height_bytes": 30,
        "gap": 0.0,
        "capacity_bytes": 30,
        "fits": True,
        "excess_bytes": 0,
        "proved_impossible": False,
    }


def test_stdin_and_stdout() -> None:
    result = CliRunner().invoke(app, ["pack", "-", "--out", "-"], input=ROWS)
    assert result.exit_code == 0, result.output
    assert set(solved(result.stdout)) == {"w", "a", "b", "c"}
    assert "Packed: 4 buffers in 30 B" in result.stderr
    assert "file        stdin" in result.stderr


def test_a_closed_stdin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InvalidArgument, match="stdin, which is closed"), open_input("-"):
        pass


def test_what_is_no_regular_file_is_written_to_as_it_is(buffers: Path) -> None:
    command = f"cat '{buffers}' | '{sys.executable}' -m stowplan pack - --out /dev/stdout | cat"
    done = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("id,lower,upper,size,kind,note,offset\nw,0,9,10,weights,")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_disk_is_told(buffers: Path, tmp_path: Path) -> None:
    assert "/dev/full: No space left on device" in told(run("pack", buffers, "--out", "/dev/full"), 2)
    command = f"'{sys.executable}' -m stowplan pack '{buffers}' > /dev/full"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "stowplan: stdout: No space left on device\n")
    (tmp_path / "out.csv.tmp").mkdir()
    assert "out.csv: Is a directory" in told(run("pack", buffers, "--out", tmp_path / "out.csv"), 2)


def test_kept_offsets_stay(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text("id,lower,upper,size,offset\na,0,4,10,100\nb,0,4,10,\n")
    assert json.loads(run("pack", file, "--json").stdout)["height_bytes"] == 20
    kept = json.loads(run("pack", file, "--json", "--keep-offsets").stdout)
    assert kept["offsets"][0] == {"id": "a", "offset": 100}
    file.write_text("id,lower,upper,size,offset\na,0,4,10,100\nb,0,4,10,95\n")
    line = told(run("pack", file, "--keep-offsets"), 2)
    assert "buffers a and b share bytes" in line


def test_no_buffers(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text("id,lower,upper,size\n")
    for suffix in (".svg", ".html"):
        result = run("pack", file, "--capacity", "1", "--picture", tmp_path / f"map{suffix}")
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("Fits: 0 buffers in 0 B of 1 B, which is the least.")


# ---- capacity --------------------------------------------------------------------------------------------------------


def over(result: Result) -> str:
    """The last line of a command that ends with 3."""
    assert result.exit_code == 3, result.output
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_a_capacity_below_the_bound_is_proved_to_be_too_small(buffers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    result = run("pack", buffers, "--capacity", "29", "--out", out)
    verdict = "Does not fit: 4 buffers take 30 B, 1 B over the capacity of 29 B. It is proved that no addresses fit."
    assert over(result) == f"stowplan: {verdict}"
    assert " ".join(result.stdout.splitlines()[:2]).startswith(verdict[:80])
    assert validate(load_problem(buffers).problem, np.array(list(solved(out.read_text()).values())), 30) is None
    said = json.loads(run("pack", buffers, "--capacity", "29", "--json").stdout)
    assert (said["fits"], said["excess_bytes"], said["proved_impossible"]) == (False, 1, True)


def test_a_capacity_that_is_missed_is_not_called_impossible(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text(
        "id,lower,upper,size,segment\na,0,1,10,s\nb,1,4,1,s\nc,1,6,9,\n"
    )  # two levels take 19, one takes 10
    said = run("pack", file, "--solver", "bilevel", "--capacity", "18", "--json")
    assert over(said).endswith("Addresses that fit were not found; that none do is not proved.")
    figures = json.loads(said.stdout)
    assert (figures["height_bytes"], figures["bound_bytes"], figures["proved_impossible"]) == (19, 10, False)
    assert run("pack", file, "--capacity", "10").exit_code == 0


def test_ends_are_padded_to_the_alignment(buffers: Path) -> None:
    said = json.loads(run("pack", buffers, "--alignment", "16", "--json").stdout)
    assert said["height_bytes"] == 48
    assert all(entry["offset"] % 16 == 0 for entry in said["offsets"])
    over(run("pack", buffers, "--alignment", "16", "--capacity", "47"))


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pictures(buffers: Path, tmp_path: Path) -> None:
    for suffix in (".svg", ".HTML"):
        picture = tmp_path / f"map{suffix}"
        result = run("pack", buffers, "--capacity", "40", "--picture", picture)
        assert result.exit_code == 0, result.output
        text = picture.read_text()
        assert "Fits: 4 buffers in 30 B of 40 B, which is the least." in text
        assert "activations (2)" in text
    ElementTree.fromstring((tmp_path / "map.svg").read_text())
    assert "<td>10 B</td>" in text


@pytest.mark.parametrize("name", ["<script>alert(1)<", "\x1b[2J\n", "\udcff", "[bold]", "&amp;"])
def test_hostile_names_of_files(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.csv"
    file.write_text(ROWS)
    for suffix in (".svg", ".html"):
        picture, out = tmp_path / f"{name}{suffix}", tmp_path / f"{name}.out"
        result = run("pack", file, "--picture", picture, "--out", out, "--capacity", "1")
        over(result)
        assert "\x1b" not in result.stdout + result.stderr
        assert "<script" not in picture.read_text()
    assert "[bold]" in result.stdout or name != "[bold]"
    assert json.loads(run("pack", file, "--json").stdout)["file"] == str(file)
    assert "line 1 lacks" in told(run("pack", picture), 2)


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["/nowhere/in.csv"], "/nowhere/in.csv: No such file or directory"),
        (["/"], "Is a directory"),
        (["IN", "--capacity", "lots"], "--capacity='lots' is not a size"),
        (["IN", "--capacity", "0.5"], "--capacity='0.5' has a fraction but no unit"),
        (["IN", "--alignment", "0"], "--alignment='0' is not positive"),
        (["IN", "--alignment", "2000000TiB"], "alignment=2199023255552000000"),
        (["IN", "--out", "/nowhere/out.csv"], "--out '/nowhere/out.csv' cannot be written"),
        (["IN", "--picture", "/nowhere/map.svg"], "--picture '/nowhere/map.svg' cannot be written"),
        (["IN", "--picture", "map.png"], "--picture 'map.png': allowed: a name that ends with .html or .svg"),
        (["IN", "--json", "--out", "-"], "--json and --out - both want stdout"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: list[str], reason: str, buffers: Path) -> None:
    given = [str(buffers) if argument == "IN" else argument for argument in arguments]
    assert reason in told(run("pack", *given), 2)


@pytest.mark.parametrize("arguments", [["--solver", "magic"], ["--time-limit", "0"], ["--time-limit", "soon"], []])
def test_bad_options_are_told_with_their_use(arguments: list[str], buffers: Path) -> None:
    result = run("pack", *([buffers, *arguments] if arguments else []))
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_a_bad_row_is_named(buffers: Path) -> None:
    buffers.write_text(ROWS.replace("b,4,8,15", "b,4,8,\x1b[2J"))
    line = told(run("pack", buffers), 2)
    assert "line 4, column 'size': '\\x1b[2J'; allowed: a whole number of bytes from 1" in line


@given(st.binary(max_size=120), st.sampled_from([b"", ROWS.encode()]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_packed_or_refused(tmp_path: Path, noise: bytes, start: bytes) -> None:
    file = tmp_path / "in.csv"
    file.write_bytes(start + noise)
    result = run("pack", file, "--time-limit", "0.1", "--picture", tmp_path / "map.svg")
    assert result.exit_code in (0, 2), result.output
    assert result.exit_code == 0 or told(result, 2).startswith("stowplan: ")


@pytest.mark.filterwarnings("default")
def test_no_compiler_is_told_in_a_line(buffers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("STOWPLAN_CACHE_DIR", str(tmp_path / "cache"))
    library.cache_clear()
    try:
        result = run("pack", buffers, "--solver", "bilevel", "--time-limit", "5")
        assert result.exit_code == 0, result.output
        assert len(result.stderr.splitlines()) == 1
        assert "CXX='no-such-compiler' is not there" in result.stderr
        assert "CXX='no-such-compiler' is not there" in told(run("pack", buffers, "--solver", "exact"), 2)
    finally:
        library.cache_clear()


def test_compiling_is_told(buffers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_tell = ["compiling stowplan_pack (once)"]

    def compiled_at_first(name: str, *sources: Any, on_progress: Callable[[str], None], **options: Any) -> Path:
        while to_tell:
            on_progress(to_tell.pop())
        return compiled(name, *sources, **options)

    monkeypatch.setattr(packer, "compiled", compiled_at_first)
    result = run("pack", buffers)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == ["compiling stowplan_pack (once)"]
    assert run("pack", buffers).stderr == ""


# ---- progress --------------------------------------------------------------------------------------------------------


def test_progress_is_sparse_where_it_stays(capsys: pytest.CaptureFixture[str]) -> None:
    tell = Tell(None)
    for tenths in range(1, 300):
        tell(2**20 + 2**10, 2**20, tenths / 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "packing: 1.00 MiB, 0.10% above the bound, 2 s"
    assert len(lines) == 7  # each half as late again as the one before


def test_progress_is_one_line_on_a_terminal() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80)
    tell = Tell(console)
    with tell.shown():
        tell(2**20, 2**20, 12.0)
    assert "packing: 1.00 MiB, at the bound, 12 s" in shown.getvalue()
    assert shown.getvalue().endswith("\x1b[2K")  # the line is taken back


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_search_and_a_second_one_the_command() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), packing_progress() as tell:  # noqa: PT012
        assert not tell(2, 1, 0.0)
        signal.raise_signal(signal.SIGINT)
        assert tell(2, 1, 0.1)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_hundred_thousand_buffers(tmp_path: Path) -> None:
    problem = churn(100_000)
    file, picture = tmp_path / "in.csv", tmp_path / "map.html"
    rows = zip(problem.lower.tolist(), problem.upper.tolist(), problem.size.tolist(), strict=True)
    file.write_text(
        "id,lower,upper,size\n"
        + "".join(f"{n},{lower},{upper},{size}\n" for n, (lower, upper, size) in enumerate(rows))
    )
    result = run("pack", file, "--solver", "greedy", "--out", tmp_path / "out.csv", "--picture", picture)
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size < 3 * 2**20
    assert "The 60,000 smallest buffers" in picture.read_text()
    assert to_csv(load_problem(tmp_path / "out.csv"), np.zeros(100_000, np.int64)).count("\n") == 100_001
