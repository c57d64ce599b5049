"""``stowplan report``: what a plan does, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stowplan.cli.terminal import told_errors

if TYPE_CHECKING:
    from stowplan.core.plan import Plan

__all__ = ["EXAMPLES", "print_plan", "report_command"]

EXAMPLES = """Examples:

\b
  stowplan report plan.json
  stowplan report plan.json --json | python -m json.tool
"""


def report_command(
    file: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan file, from stowplan plan --out.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, checked, instead of text.")] = False,
) -> None:
    """Show what a plan does, what it costs and what it rests on."""
    with told_errors():
        from stowplan.core.plan import Plan

        print_plan(Plan.load(file), as_json)


def print_plan(plan: Plan, as_json: bool) -> None:
    """The plan on stdout: its report, or itself as JSON."""
    if as_json:
        typer.echo(plan.to_json(), nl=False)
        return
    from stowplan.reports.text import render

    typer.echo(render(plan), nl=False)
