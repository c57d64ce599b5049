"""``stowplan pack``: addresses for buffers whose lifetimes are known, from a CSV file."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated

import typer

from stowplan.cli.files import STANDARD, open_input, refuse_missing_directory, refuse_picture, write_text
from stowplan.cli.terminal import INFEASIBLE, fail, say, told_errors
from stowplan.core.errors import InvalidArgument

if TYPE_CHECKING:
    from stowplan.planner.packing import Solution
    from stowplan.planner.packing.csv_file import ProblemFile
    from stowplan.reports.packing import PackingReport

__all__ = ["EXAMPLES", "Solver", "pack_command"]


class Solver(StrEnum):
    """Who looks for addresses."""

    AUTO = "auto"
    GREEDY = "greedy"
    EXACT = "exact"
    BILEVEL = "bilevel"


EXAMPLES = """Examples:

\b
  stowplan pack buffers.csv
  stowplan pack buffers.csv --capacity 1MiB --out packed.csv --picture packed.html
  stowplan pack trace.csv --alignment 512 --solver bilevel --time-limit 30 --json
  cat buffers.csv | stowplan pack - --out - > packed.csv

The file has the columns id,lower,upper,size, as minimalloc's have; the answer has one more, offset. Exit code 3: the
buffers do not fit the capacity; the best addresses that were found are written all the same.
"""


def pack_command(
    file: Annotated[str, typer.Argument(metavar="IN.csv|-", help="Buffers: id,lower,upper,size; - is stdin.")],
    capacity: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes that the buffers are to fit, such as 1MiB.")
    ] = None,
    alignment: Annotated[str, typer.Option(metavar="SIZE", help="Offsets are multiples of so many bytes.")] = "1",
    keep_offsets: Annotated[
        bool, typer.Option("--keep-offsets", help="Buffers with a number in the column offset stay there.")
    ] = False,
    solver: Annotated[Solver, typer.Option(help="Who looks for addresses.")] = Solver.AUTO,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Time for the solver.")] = 10.0,
    out: Annotated[
        str | None, typer.Option(metavar="OUT.csv|-", help="Write the file with offsets; - is stdout.")
    ] = None,
    picture: Annotated[str | None, typer.Option(metavar="OUT.html|OUT.svg", help="Draw the addresses.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result and all offsets as JSON on stdout.")
    ] = False,
) -> None:
    """Give addresses to buffers with known lifetimes, so that the highest is least."""
    with told_errors():
        _refuse_outputs(out, picture, as_json)
        capacity_bytes = None if capacity is None else _bytes(capacity, "--capacity")
        alignment_bytes = _bytes(alignment, "--alignment")
        from stowplan.planner.packing.csv_file import read_problem

        source = "stdin" if file == STANDARD else file
        with open_input(file) as stream:
            table = read_problem(
                stream,
                source,
                alignment=alignment_bytes,
                keep_offsets=keep_offsets,
                with_segments=solver is Solver.BILEVEL,
            )
        solution = _solve(table, capacity_bytes, solver, time_limit)
        report = _report(table, solution, source, capacity_bytes)
        _write(table, solution, report, out, picture)
        _print(table, solution, report, as_json, to_stderr=out == STANDARD)
        if report.excess_bytes:
            fail(report.verdict, INFEASIBLE)


def _refuse_outputs(out: str | None, picture: str | None, as_json: bool) -> None:
    refuse_missing_directory(out)
    refuse_picture(picture)
    if as_json and out == STANDARD:
        raise InvalidArgument("--json and --out - both want stdout; give --out a file.")


def _bytes(text: str, name: str) -> int:
    from stowplan.core.units import parse_bytes

    return parse_bytes(text, name)


def _solve(table: ProblemFile, capacity_bytes: int | None, solver: Solver, time_limit: float) -> Solution:
    """The best addresses that are found; also where it is proved that none are within the capacity."""
    from stowplan.cli.progress import packing_progress
    from stowplan.core.errors import CompilationFailed, InfeasibleCapacity
    from stowplan.planner.packing import pack, prepare

    with suppress(CompilationFailed):  # pack tells, or does without
        prepare(say)
    began = time.monotonic()
    with _told_warnings(), packing_progress() as tell:
        find = partial(pack, table.problem, solver=solver.value, segments=table.segments, on_progress=tell)
        try:
            return find(capacity_bytes=capacity_bytes, time_limit_seconds=time_limit)
        except InfeasibleCapacity as error:
            left = max(0.0, began + time_limit - time.monotonic())
            solution = find(time_limit_seconds=left)
            bound_bytes = max(error.least_bytes, solution.bound_bytes)
            return replace(solution, bound_bytes=bound_bytes, seconds=time.monotonic() - began)


@contextmanager
def _told_warnings() -> Iterator[None]:
    """Each warning in a line, once, when the work is done: without a compiler a search warns as often as it packs."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        say(message)


def _report(table: ProblemFile, solution: Solution, source: str, capacity_bytes: int | None) -> PackingReport:
    from stowplan.reports.packing import PackingReport

    return PackingReport(
        source=source,
        num_buffers=len(table.problem),
        alignment=table.problem.alignment,
        height_bytes=solution.height_bytes,
        bound_bytes=solution.bound_bytes,
        capacity_bytes=capacity_bytes,
        solver=solution.solver,
        seconds=solution.seconds,
    )


def _write(table: ProblemFile, solution: Solution, report: PackingReport, out: str | None, picture: str | None) -> None:
    if out is not None:
        from stowplan.planner.packing.csv_file import to_csv

        write_text(out, to_csv(table, solution.offsets))
        if out != STANDARD:
            say(f"offsets written to {out}")
    if picture is not None:
        from stowplan.reports.address_map import AddressMap
        from stowplan.reports.address_map_files import to_html, to_svg

        problem = table.problem
        chart = AddressMap(
            lower=problem.lower,
            upper=problem.upper,
            size=problem.size,
            offsets=solution.offsets,
            names=problem.names,
            kinds=table.kinds,
            capacity_bytes=report.capacity_bytes,
            verdict=report.verdict,
            figures=report.figures,
        )
        draw = to_svg if PurePath(picture).suffix.lower() == ".svg" else to_html
        write_text(picture, draw(chart))
        say(f"picture written to {picture}")


def _print(table: ProblemFile, solution: Solution, report: PackingReport, as_json: bool, *, to_stderr: bool) -> None:
    if not as_json:
        typer.echo(report.render(), nl=False, err=to_stderr)
        return
    import json

    pairs = zip(table.problem.names, solution.offsets.tolist(), strict=True)
    offsets = [{"id": name, "offset": offset} for name, offset in pairs]
    typer.echo(json.dumps({**report.as_dict(), "offsets": offsets}, indent=1))
