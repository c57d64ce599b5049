"""``stowplan snapshots status`` and ``end``: what this host's memory processes hold; giving it up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stowplan.cli.terminal import told_errors

if TYPE_CHECKING:
    from stowplan.runtime.snapshot.memory.messages import Status

__all__ = ["EXAMPLES", "app", "end_command", "status_command"]

EXAMPLES = """Examples:

\b
  stowplan snapshots status
  stowplan snapshots status --run llama-7
  stowplan snapshots status --json | python -m json.tool
  stowplan snapshots end --run llama-7
"""

app = typer.Typer(help="Look at snapshots in this host's memory, and give them up.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at snapshots in this host's memory, and give them up."""


@app.command("status", epilog=EXAMPLES)
def status_command(
    run: Annotated[str | None, typer.Option("--run", metavar="NAME", help="Of this run only.")] = None,
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Where sockets are. Default: where stowplan puts them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Tell of each memory process of this user on this host what it holds, and what redundancy lacks."""
    import json

    from stowplan.core.records import to_plain
    from stowplan.runtime.snapshot.memory.connection import serving

    with told_errors():
        found = [status for _, status in serving(run, directory)]
    if as_json:
        typer.echo(json.dumps([to_plain(status) for status in found], indent=2))
    elif found:
        typer.echo("\n".join(line for status in found for line in _lines(status)))
    else:
        typer.echo("No memory process of snapshots runs here.")


@app.command("end", epilog=EXAMPLES)
def end_command(
    run: Annotated[str, typer.Option("--run", metavar="NAME", help="Of this run.")],
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Where sockets are. Default: where stowplan puts them.")
    ] = None,
) -> None:
    """End a run's memory processes on this host: its snapshots in memory are lost, copies on disk stay."""
    from stowplan.runtime.snapshot.memory.connection import serving
    from stowplan.runtime.snapshot.memory.messages import Done, End

    with told_errors():
        ended = 0
        for connection, status in serving(run, directory):
            connection.ask(End(), Done)
            typer.echo(f"Ended process {status.pid} of run {status.run} on node {status.node}.")
            ended += 1
    if not ended:
        typer.echo(f"No memory process of run {run} runs here.")


def _lines(status: Status) -> list[str]:
    from stowplan.core.units import format_bytes

    lines = [f"run {status.run}, node {status.node}: process {status.pid}, generation {status.generation}"]
    steps = {slot.step for rank in status.ranks for slot in rank.slots if slot.sequence == status.global_sequence}
    last = f"step {min(steps)} (snapshot {status.global_sequence})" if status.global_sequence else "none yet"
    lines.append(f"  last that all ranks have: {last}; {_stands(status)}")
    for rank in status.ranks:
        writer = f"written by process {rank.writer_pid}" if rank.writer_pid else "no writer"
        parity = f" and {format_bytes(rank.parity_bytes)} of parity" if rank.parity_bytes else ""
        lines.append(f"  rank {rank.rank}: 2 slots of {format_bytes(rank.data_bytes)}{parity}, {writer}")
        if rank.blocking_seconds is not None and rank.total_seconds is not None:
            last = f"stopped training for {rank.blocking_seconds:.3f} s, took {rank.total_seconds:.3f} s in all"
            if rank.coding.n > 1:
                last += f", and {format_bytes(rank.received_bytes or 0)} from other nodes"
            lines.append(f"    the last one {last}")
        lines += [
            f"    snapshot {slot.sequence}, step {slot.step}: {slot.state.name}, {format_bytes(slot.data_bytes)}"
            for slot in sorted(rank.slots, key=lambda slot: -slot.sequence)
            if slot.state
        ]
    return [*lines, *(f"  reduced: {problem}" for problem in status.reduced)]


def _stands(status: Status) -> str:
    coding = status.ranks[0].coding if status.ranks else None
    if coding is None or coding.n == 1:
        return "all trainers may be lost, not the node"
    return f"all trainers may be lost, and any {coding.m} of {coding.n} nodes ({coding.code})"
