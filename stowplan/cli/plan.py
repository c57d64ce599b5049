"""``stowplan plan``: one training step within a memory budget."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from stowplan.cli.files import STANDARD, refuse_missing_directory, write_text
from stowplan.cli.report import print_plan
from stowplan.cli.terminal import say, told_errors
from stowplan.core.errors import InvalidArgument
from stowplan.jobs import OptimizerName, Precision, job_from_config, job_from_function

if TYPE_CHECKING:
    from stowplan.core.hardware import Hardware
    from stowplan.jobs import Job
    from stowplan.runtime.snapshot.codes import Name
    from stowplan.runtime.snapshot.reservation import SnapshotMemory

__all__ = ["EXAMPLES", "plan_command"]

EXAMPLES = """Examples:

\b
  stowplan plan --model train.py:job --budget 60GiB --out plan.json
  stowplan plan --model-config llama/config.json --seq-len 4096 --batch-size 1 --budget 8GiB
  stowplan plan --model mypackage.jobs:small --budget 512MiB --json > plan.json
  stowplan plan --model-config llama-3-8b/ --seq-len 8192 --dtype bfloat16 --hardware h100-sxm

The function after the colon takes no arguments and returns (model, batch), (model, batch, optimizer), or a dict or
object with these names. Exit code 3: no plan fits; the message names the least budget that has one.
"""


def plan_command(
    model: Annotated[
        str | None,
        typer.Option(metavar="PLACE:FUNCTION", help="A function of a module or .py file that makes the job."),
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A Hugging Face config.json (or its directory); random weights.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a sequence, with --model-config.  [default: 1024]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences in a batch, with --model-config.  [default: 1]")
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Numbers to compute in, with --model-config.  [default: float32]")
    ] = None,
    optimizer: Annotated[
        OptimizerName | None, typer.Option(help="Optimizer, with --model-config.  [default: adamw]")
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="SIZE|auto", help="Bytes on the device for this process, such as 60GiB.")
    ] = "auto",
    host_budget: Annotated[
        str, typer.Option(metavar="SIZE|auto", help="Bytes on the host for swapped values, and for snapshots.")
    ] = "auto",
    snapshots: Annotated[
        int | None, typer.Option(min=1, metavar="NODES", help="Snapshots are taken on so many nodes: leave them room.")
    ] = None,
    snapshot_m: Annotated[int, typer.Option(min=1, help="How many nodes may be lost, with --snapshots.")] = 1,
    snapshot_code: Annotated[
        str | None, typer.Option(metavar="NAME", help="mirror, raim5 or rs, with --snapshots.  [default: by m]")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(metavar="NAME", help="A known machine, which need not be here: h100-sxm, ...")
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Do not run the model: build it without memory, count fake tensors.")
    ] = False,
    chunked_head: Annotated[
        bool,
        typer.Option("--chunked-head", help="Allow the head and its loss in chunks: not bit for bit, no logits."),
    ] = False,
    inexact: Annotated[
        bool, typer.Option("--inexact", help="Allow rows recomputed alone to differ by rounding; losses may, too.")
    ] = False,
    tolerance: Annotated[
        float | None, typer.Option(metavar="FRACTION", help="By how much, with --inexact.  [default: by dtype]")
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(metavar="DOTTED.NAME", help="The module list that holds the blocks, if not found.")
    ] = None,
    solver: Annotated[str, typer.Option(metavar="NAME", help="A MIP solver known to PuLP.")] = "HiGHS",
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Time for the solver.")] = 5.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as JSON, and nothing else, on stdout.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="PLAN.json", help="Write the plan to this file, too.")] = None,
    allocations: Annotated[
        Path | None,
        typer.Option(metavar="OUT.csv", help="Plan addresses, too, and write the step's buffers to this file."),
    ] = None,
) -> None:
    """Plan one training step of a model within a memory budget, and report on the plan."""
    with told_errors():
        refuse_missing_directory(out)
        refuse_missing_directory(allocations, "--allocations")
        if str(allocations) == STANDARD:
            raise InvalidArgument("--allocations takes the name of a file: stdout is for the report.")
        if tolerance is not None and not inexact:
            raise InvalidArgument("--tolerance goes with --inexact.")
        device_bytes, host_bytes = _size(budget, "--budget"), _size(host_budget, "--host-budget")
        machine = _hardware(hardware)
        memory = _snapshots(snapshots, snapshot_m, snapshot_code)
        say("making the model")
        from stowplan import session

        dry = dry or machine is not None
        with session.dry() if dry else nullcontext():
            job = _job(model, model_config, seq_len, batch_size, dtype, optimizer)
        with job.surroundings():
            made = session.plan(
                job.model,
                job.batch,
                budget=device_bytes,
                host_budget=host_bytes,
                optimizer=job.optimizer,
                hardware=machine,
                chunked_head=chunked_head or None,
                exact=not inexact,
                tolerance=tolerance,
                blocks=blocks,
                solver=solver,
                time_limit_seconds=time_limit,
                allocations=allocations is not None,
                snapshots=memory,
                on_progress=say,
            )
        if allocations is not None:
            write_text(str(allocations), session.allocations(made).to_csv())
            say(f"allocations written to {allocations}")
        if out is not None:
            made.save(out)
            say(f"plan written to {out}")
        print_plan(made, as_json)


def _job(
    model: str | None,
    model_config: Path | None,
    seq_len: int | None,
    batch_size: int | None,
    dtype: Precision | None,
    optimizer: OptimizerName | None,
) -> Job:
    """The job that exactly one of --model and --model-config names."""
    if model is not None and model_config is None:
        if any(setting is not None for setting in (seq_len, batch_size, dtype, optimizer)):
            raise InvalidArgument("--seq-len, --batch-size, --dtype and --optimizer go with --model-config only.")
        return job_from_function(model)
    if model_config is not None and model is None:
        return job_from_config(
            model_config,
            seq_len=seq_len or 1024,
            batch_size=batch_size or 1,
            precision=dtype or Precision.FLOAT32,
            optimizer=optimizer or OptimizerName.ADAMW,
        )
    raise InvalidArgument("give either --model PLACE:FUNCTION or --model-config PATH.")


def _size(text: str, name: str) -> int | str:
    """A budget as bytes, or ``"auto"``; read before the model is made, so that a mistake is told at once."""
    from stowplan.core.units import parse_bytes

    return text if text == "auto" else parse_bytes(text, name)


def _snapshots(num_nodes: int | None, m: int, code: str | None) -> SnapshotMemory | None:
    from stowplan.runtime.snapshot.reservation import SnapshotMemory

    if num_nodes is None:
        if m != 1 or code is not None:
            raise InvalidArgument("--snapshot-m and --snapshot-code go with --snapshots NODES.")
        return None
    return SnapshotMemory(num_nodes=num_nodes, m=m, code=cast("Name | None", code))


def _hardware(name: str | None) -> Hardware | None:
    from stowplan.core.hardware import preset

    return None if name is None else preset(name)
