"""What all commands say in the same way: exit codes, progress, errors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from stowplan.core.errors import InfeasibleBudget, InfeasibleSchedule, StowplanError

__all__ = ["BAD_INPUT", "BROKEN", "INFEASIBLE", "fail", "say", "told_errors"]

BROKEN, BAD_INPUT, INFEASIBLE = 1, 2, 3


def say(progress: str) -> None:
    """One line of progress on stderr."""
    _print_line(progress, style="dim")


@contextmanager
def told_errors() -> Iterator[None]:
    """Tell what the user can mend in one line and an exit code; a bug of ours keeps its traceback."""
    try:
        yield
    except (InfeasibleBudget, InfeasibleSchedule) as error:
        fail(str(error), INFEASIBLE)
    except StowplanError as error:
        fail(str(error), BAD_INPUT)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        fail(f"{error.filename or 'stdout'}: {error.strerror}", BAD_INPUT)
    except Exception as error:
        if not any("the model's forward" in note for note in getattr(error, "__notes__", ())):
            raise
        fail(f"the model's forward failed on the job's batch: {type(error).__name__}: {error}", BAD_INPUT)


def fail(message: str, code: int) -> NoReturn:
    """Say ``message`` in one line on stderr and exit with ``code``."""
    _print_line(f"stowplan: {message}", style="bold red")
    raise typer.Exit(code)


def _print_line(text: str, style: str) -> None:
    from rich.console import Console

    line = " ".join(part.strip() for part in text.splitlines())
    printable = "".join(character if character.isprintable() else "?" for character in line)
    Console(stderr=True).print(printable, style=style, markup=False, highlight=False, soft_wrap=True, emoji=False)
