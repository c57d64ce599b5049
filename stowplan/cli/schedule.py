"""``stowplan schedule``: who computes what, and when, in a pipeline within a memory limit."""

from __future__ import annotations

from enum import StrEnum
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated

import typer

from stowplan.cli.files import STANDARD, refuse_missing_directory, refuse_picture, write_text
from stowplan.cli.terminal import INFEASIBLE, fail, say, told_errors
from stowplan.core.errors import InvalidArgument

if TYPE_CHECKING:
    from stowplan.planner.schedule import Costs, Timeline
    from stowplan.reports.pipeline import PipelineReport

__all__ = ["EXAMPLES", "ScheduleKind", "schedule_command"]

EXAMPLES = """Examples:

\b
  stowplan schedule --kind v-half --devices 4 --microbatches 12
  stowplan schedule --devices 8 --microbatches 24 --limit 6 --times 10:13:8 --picture step.html
  stowplan schedule --devices 8 --microbatches 32 --limit 40GiB --activations 6GiB --static 9GiB
  stowplan schedule --kind v-min --devices 4 --microbatches 8 --csv step.csv --json > step.json

The CSV is what torch.distributed.pipelining loads as compute_only. Exit code 3: no schedule stays within the limit;
the message names the least limit that has one.
"""


class ScheduleKind(StrEnum):
    """A schedule with a name, or the best that is found."""

    AUTO = "auto"
    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZB_H1 = "zb-h1"
    V_MIN = "v-min"
    V_HALF = "v-half"
    V_ZB = "v-zb"


def schedule_command(
    devices: Annotated[int, typer.Option(min=1, max=1024, help="Devices of the pipeline; each holds two stages.")],
    microbatches: Annotated[int, typer.Option(min=1, max=65536, help="Microbatches of a step.")],
    kind: Annotated[ScheduleKind, typer.Option(help="A schedule by name, or the best found.")] = ScheduleKind.AUTO,
    times: Annotated[str, typer.Option(metavar="F:I:W", help="Times of a stage's passes, in any unit.")] = "1:1:1",
    communication: Annotated[float, typer.Option(min=0, help="Time from device to device, in that unit.")] = 0.0,
    limit: Annotated[
        str | None, typer.Option(metavar="COUNT|SIZE", help="Most microbatches, or bytes, on a device.")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes that a microbatch leaves on a device.")
    ] = None,
    static: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes on a device that are there all the time.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="How much is tried, with --kind auto.")] = None,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Time for the search.")] = 50.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the search's random numbers.")] = 0,
    csv: Annotated[str | None, typer.Option("--csv", metavar="OUT.csv|-", help="Write the schedule.")] = None,
    picture: Annotated[str | None, typer.Option(metavar="OUT.html|OUT.svg", help="Draw the step.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the schedule and its figures as JSON.")] = False,
) -> None:
    """Order the work of a pipeline, and show who idles when and what is held meanwhile."""
    with told_errors():
        _refuse_outputs(csv, picture, as_json)
        limit_microbatches, limit_bytes = _limits(limit, activations)
        costs = _costs(devices, times, communication, activations, static)
        if kind is ScheduleKind.AUTO:
            from stowplan.planner.schedule import search

            found = search(
                costs,
                devices,
                microbatches,
                limit_microbatches=limit_microbatches,
                limit_bytes=limit_bytes,
                steps=steps,
                time_limit_seconds=time_limit,
                seed=seed,
            )
            timeline, bound, named = found.timeline, found.bound_seconds, found.named_seconds
            bound = max(bound, found.published_bound_seconds)
            name = f"best found ({found.origin})"
        else:
            timeline, bound, named, name = _named(kind.value, costs, devices, microbatches), None, {}, kind.value
        from stowplan.runtime.pipeline.reporting import report_of

        report = report_of(
            name,
            timeline,
            in_bytes=activations is not None,
            limit_microbatches=limit_microbatches,
            limit_bytes=limit_bytes,
            bound_seconds=bound,
            named_seconds=named,
        )
        if kind is not ScheduleKind.AUTO:
            _warn_of_1f1b(kind, timeline, costs, devices, microbatches)
        _write(report, timeline, csv, picture)
        _print(report, timeline, as_json, csv)
        if report.limit is not None and report.peak > report.limit:
            least = f"the least limit of {kind.value} is {report.amount(report.peak)}; --kind auto may do with less"
            fail(f"{kind.value} does not stay within {report.amount(report.limit)}: {least}", INFEASIBLE)


def _refuse_outputs(csv: str | None, picture: str | None, as_json: bool) -> None:
    refuse_missing_directory(csv, "--csv")
    refuse_picture(picture)
    if as_json and csv == STANDARD:
        raise InvalidArgument("--json and --csv - both want stdout; give --csv a file.")


def _limits(limit: str | None, activations: str | None) -> tuple[int | None, int | None]:
    """(microbatches, bytes): a whole number without a unit is microbatches."""
    from stowplan.core.units import parse_bytes

    if limit is None:
        return None, None
    if limit.strip().isdecimal():
        if int(limit) < 1:
            raise InvalidArgument(f"--limit {limit}: the least limit is 1 microbatch, which every schedule needs.")
        return int(limit), None
    limit_bytes = parse_bytes(limit, "--limit")
    if activations is None:
        raise InvalidArgument(f"--limit {limit} is in bytes: say with --activations how many a microbatch takes.")
    return None, limit_bytes


def _costs(devices: int, times: str, communication: float, activations: str | None, static: str | None) -> Costs:
    """Two equal stages a device."""
    from dataclasses import replace

    from stowplan.core.units import parse_bytes
    from stowplan.planner.schedule import Costs

    parts = times.split(":")
    try:
        forward, input_gradient, weight_gradient = map(float, parts)
    except ValueError:
        raise InvalidArgument(f"--times {times!r}: give three positive numbers, F:I:W, such as 10:13:8.") from None
    seconds = forward, input_gradient, weight_gradient
    costs = Costs.uniform(2 * devices, seconds, communication_seconds=communication)
    if static is not None and activations is None:
        raise InvalidArgument("--static is in bytes: say with --activations how many a microbatch takes.")
    if activations is None:
        return costs
    activation_bytes = parse_bytes(activations, "--activations")
    static_bytes = 0 if static is None else parse_bytes(static, "--static")
    stages = [
        replace(
            stage,
            forward_bytes=-(-activation_bytes // 2),
            static_bytes=static_bytes // 2 if number < devices else static_bytes - static_bytes // 2,
        )
        for number, stage in enumerate(costs.stages)
    ]
    return replace(costs, stages=tuple(stages))


def _named(name: str, costs: Costs, devices: int, microbatches: int) -> Timeline:
    from stowplan.planner.schedule import generate, simulate, stages_per_device

    schedule = generate(name, devices, microbatches)
    return simulate(schedule, costs if stages_per_device(name) == 2 else costs.merged(2))


def _warn_of_1f1b(kind: ScheduleKind, timeline: Timeline, costs: Costs, devices: int, microbatches: int) -> None:
    if kind in (ScheduleKind.GPIPE, ScheduleKind.ONE_F_ONE_B):
        return
    plain = _named("1f1b", costs, devices, microbatches)
    if timeline.step_seconds > plain.step_seconds:
        slower = timeline.step_seconds / plain.step_seconds - 1
        say(f"{kind.value} takes {slower:.1%} longer than 1f1b at these times; --kind auto finds what does not")


def _write(report: PipelineReport, timeline: Timeline, csv: str | None, picture: str | None) -> None:
    if csv is not None:
        write_text(csv, timeline.schedule.to_csv())
        if csv != STANDARD:
            say(f"schedule written to {csv}")
    if picture is not None:
        from stowplan.reports.pipeline_files import to_html, to_svg

        draw = to_svg if PurePath(picture).suffix.lower() == ".svg" else to_html
        write_text(picture, draw(report))
        say(f"picture written to {picture}")


def _print(report: PipelineReport, timeline: Timeline, as_json: bool, csv: str | None) -> None:
    if not as_json:
        typer.echo(report.render(), nl=False, err=csv == STANDARD)
        return
    import json

    schedule = timeline.schedule
    told = {
        **report.as_dict(),
        "stage_devices": schedule.stage_devices,
        "orders": [list(map(str, order)) for order in schedule.orders],
    }
    typer.echo(json.dumps(told, indent=1))
