"""Commands run in this process, and what they say when they fail."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from stowplan.cli import app


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def told(result: Result, code: int) -> str:
    """The one line that a command that failed with ``code`` has to say; no traceback, nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    return lines[-1]
