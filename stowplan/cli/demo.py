"""``stowplan demo``: a small model with and without a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stowplan.cli.terminal import told_errors

__all__ = ["EXAMPLES", "demo_command"]

EXAMPLES = """Examples:

\b
  stowplan demo
  stowplan demo --quick --out /tmp/stowplan-demo
"""


def demo_command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where plans and reports are written.")] = Path("demo-out"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 7,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller model, in under a minute.")] = False,
) -> None:
    """Plan a small model, train it with and without the plan, and compare losses bit by bit."""
    with told_errors():
        from stowplan.demo import run

        run(out, steps, quick)
