"""``stowplan doctor``: does stowplan work here?"""

from __future__ import annotations

from typing import Annotated

import typer

from stowplan.cli.terminal import BROKEN, say

__all__ = ["EXAMPLES", "doctor_command"]

EXAMPLES = """Examples:

\b
  stowplan doctor
  stowplan doctor --json > doctor.json

Exit code 1: something is broken.
"""


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, and nothing else.")] = False,
) -> None:
    """Tell versions, devices, speeds and budgets, and check that planning is exact on this machine."""
    import json

    from stowplan.doctor import State, examine, render

    findings = examine(say)
    fine = all(finding.state is not State.BROKEN for finding in findings)
    if as_json:
        typer.echo(json.dumps({"fine": fine, "findings": [finding.as_dict() for finding in findings]}, indent=2))
    else:
        typer.echo(render(findings), nl=False)
    if not fine:
        raise typer.Exit(BROKEN)
