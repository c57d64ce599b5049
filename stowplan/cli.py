"""The command line: ``stowplan plan``, ``stowplan report``, ``stowplan demo``, ``stowplan doctor``.

Exit codes: 0 done, 2 what was given cannot be used, 3 no plan fits the budget (the message names the least one that
has a plan), 1 a bug of ours, or something that ``doctor`` found broken. Results go to stdout, progress and errors to
stderr. What a command needs is imported when it runs, so that help and reports come at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import stowplan
from stowplan.core.errors import InfeasibleBudget, InvalidArgument, StowplanError
from stowplan.jobs import OptimizerName, Precision, job_from_config, job_from_function

if TYPE_CHECKING:
    from stowplan.core.hardware import Hardware
    from stowplan.core.plan import Plan
    from stowplan.jobs import Job

__all__ = ["app", "main"]

BROKEN, BAD_INPUT, INFEASIBLE = 1, 2, 3

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


PLAN_EXAMPLES = """Examples:

\b
  stowplan plan --model train.py:job --budget 60GiB --out plan.json
  stowplan plan --model-config llama/config.json --seq-len 4096 --batch-size 1 --budget 8GiB
  stowplan plan --model mypackage.jobs:small --budget 512MiB --json > plan.json
  stowplan plan --model-config llama-3-8b/ --seq-len 8192 --dtype bfloat16 --hardware h100-sxm

The function after the colon takes no arguments and returns (model, batch), (model, batch, optimizer), or a dict or
object with these names. Exit code 3: no plan fits; the message names the least budget that has one.
"""


@app.command("plan", epilog=PLAN_EXAMPLES)
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
        str, typer.Option(metavar="SIZE|auto", help="Bytes on the host for swapped values.")
    ] = "auto",
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
    with _told_errors():
        _refuse_missing_directory(out, "--out")
        _refuse_missing_directory(allocations, "--allocations")
        if tolerance is not None and not inexact:
            raise InvalidArgument("--tolerance goes with --inexact.")
        device_bytes, host_bytes = _size(budget, "--budget"), _size(host_budget, "--host-budget")
        machine = _hardware(hardware)
        _say("making the model")
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
                on_progress=_say,
            )
        if allocations is not None:
            allocations.write_text(session.allocations(made).to_csv(), encoding="utf-8")
            _say(f"allocations written to {allocations}")
        if out is not None:
            made.save(out)
            _say(f"plan written to {out}")
        _print_plan(made, as_json)


REPORT_EXAMPLES = """Examples:

\b
  stowplan report plan.json
  stowplan report plan.json --json | python -m json.tool
"""


@app.command("report", epilog=REPORT_EXAMPLES)
def report_command(
    file: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan file, from stowplan plan --out.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, checked, instead of text.")] = False,
) -> None:
    """Show what a plan does, what it costs and what it rests on."""
    with _told_errors():
        from stowplan.core.plan import Plan

        _print_plan(Plan.load(file), as_json)


DEMO_EXAMPLES = """Examples:

\b
  stowplan demo
  stowplan demo --quick --out /tmp/stowplan-demo
"""


@app.command("demo", epilog=DEMO_EXAMPLES)
def demo_command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where plans and reports are written.")] = Path("demo-out"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 7,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller model, in under a minute.")] = False,
) -> None:
    """Plan a small model, train it with and without the plan, and compare losses bit by bit."""
    with _told_errors():
        from stowplan.demo import run

        run(out, steps, quick)


DOCTOR_EXAMPLES = """Examples:

\b
  stowplan doctor
  stowplan doctor --json > doctor.json

Exit code 1: something is broken.
"""


@app.command("doctor", epilog=DOCTOR_EXAMPLES)
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, and nothing else.")] = False,
) -> None:
    """Tell versions, devices, speeds and budgets, and check that planning is exact on this machine."""
    import json

    from stowplan.doctor import State, examine, render

    findings = examine(_say)
    fine = all(finding.state is not State.BROKEN for finding in findings)
    if as_json:
        typer.echo(json.dumps({"fine": fine, "findings": [finding.as_dict() for finding in findings]}, indent=2))
    else:
        typer.echo(render(findings), nl=False)
    if not fine:
        raise typer.Exit(BROKEN)


# ---- what commands share ---------------------------------------------------------------------------------------------


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


def _hardware(name: str | None) -> Hardware | None:
    from stowplan.core.hardware import preset

    return None if name is None else preset(name)


def _refuse_missing_directory(out: Path | None, option: str) -> None:
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InvalidArgument(f"{option} {str(out)!r} cannot be written: give a file in a directory that exists.")


def _print_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        typer.echo(plan.to_json(), nl=False)
        return
    from stowplan.reports.text import render

    addresses = None
    if plan.arena_bytes is not None:
        from stowplan.planner.addresses import addresses_of

        addresses = addresses_of(plan)
    typer.echo(render(plan, addresses=addresses), nl=False)


def _say(progress: str) -> None:
    """One line of progress on stderr."""
    _print_line(progress, style="dim")


@contextmanager
def _told_errors() -> Iterator[None]:
    """Tell what the user can mend in one line and an exit code; a bug of ours keeps its traceback."""
    try:
        yield
    except InfeasibleBudget as error:
        _fail(str(error), INFEASIBLE)
    except StowplanError as error:
        _fail(str(error), BAD_INPUT)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", BAD_INPUT)
    except Exception as error:
        if not any("the model's forward" in note for note in getattr(error, "__notes__", ())):
            raise
        _fail(f"the model's forward failed on the job's batch: {type(error).__name__}: {error}", BAD_INPUT)


def _fail(message: str, code: int) -> NoReturn:
    _print_line(f"stowplan: {message}", style="bold red")
    raise typer.Exit(code)


def _print_line(text: str, style: str) -> None:
    from rich.console import Console

    line = " ".join(part.strip() for part in text.splitlines())
    printable = "".join(character if character.isprintable() else "?" for character in line)
    Console(stderr=True).print(printable, style=style, markup=False, highlight=False, soft_wrap=True, emoji=False)
