"""The command line: a module for each of ``stowplan plan``, ``report``, ``pack``, ``schedule``, ``snapshots``, ``demo``
and ``doctor``.

Exit codes: 0 done, 2 what was given cannot be used, 3 no plan fits the budget (the message names the least one that
has a plan), or no addresses within the capacity, or no schedule within the limit, were found, 1 a bug of ours, or
something that ``doctor`` found broken. Results go to stdout, progress and errors to stderr. What a command needs is
imported when it runs, so that help and reports come at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

import stowplan
from stowplan.cli import demo, doctor, pack, plan, report, schedule, snapshots

__all__ = ["app", "main"]

app = typer.Typer(
    name="stowplan",
    help="Decide what each block of a model keeps, swaps to the host or recomputes, and train under that plan.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Entry point of the command ``stowplan``."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stowplan {stowplan.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Decide what each block of a model keeps, swaps to the host or recomputes, and train under that plan."""


app.command("plan", epilog=plan.EXAMPLES)(plan.plan_command)
app.command("report", epilog=report.EXAMPLES)(report.report_command)
app.command("pack", epilog=pack.EXAMPLES)(pack.pack_command)
app.command("schedule", epilog=schedule.EXAMPLES)(schedule.schedule_command)
app.add_typer(snapshots.app, name="snapshots")
app.command("demo", epilog=demo.EXAMPLES)(demo.demo_command)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor_command)
