"""Pipeline schedules within every limit: the best found, bounds, and the named schedules that fit.

    python -m benchmarks.schedule                           # p = 4, 8, 16, three kinds of stages: about ten minutes
    python -m benchmarks.schedule --devices 4 --stages equal

Each limit is a number of microbatches' activations per device, from 1 to p; m = 3p microbatches; the best schedule of a
limit is handed to the next one. Everything is simulated and steps of search are counted, so neither the machine nor how
busy it is matters. Results go to benchmarks/results/schedule.{json,md}.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.record import write_record
from stowplan.planner.schedule import NAMES, Costs, search

RESULTS = Path(__file__).parent / "results"
COMMUNICATION_SECONDS = 1.0  # where F:I:W are 10:13:8


def equal(num_stages: int) -> Costs:
    return Costs.uniform(num_stages)


def real(num_stages: int) -> Costs:
    return Costs.uniform(num_stages, (10.0, 13.0, 8.0), communication_seconds=COMMUNICATION_SECONDS)


def uneven(num_stages: int) -> Costs:
    """The first stage takes 0.8 of the others' time, the last one, with a large head, 1.5 times as long."""
    costs = real(num_stages)
    stages = list(costs.stages)
    for place, factor in ((0, 0.8), (-1, 1.5)):
        forward, input_gradient, weight_gradient = (factor * seconds for seconds in stages[place].seconds)
        stages[place] = replace(
            stages[place],
            forward_seconds=forward,
            input_gradient_seconds=input_gradient,
            weight_gradient_seconds=weight_gradient,
        )
    return replace(costs, stages=tuple(stages))


STAGES = {"equal": equal, "real": real, "uneven": uneven}
TITLES = {
    "equal": "All passes take one tick",
    "real": "F:I:W = 10:13:8, communication 1",
    "uneven": "F:I:W = 10:13:8, communication 1, first stage 0.8 and last stage 1.5 of that",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[4, 8, 16], help="numbers of devices")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="times of the stages")
    parser.add_argument("--steps", type=int, default=300_000, help="steps of search for each limit")
    parser.add_argument("--output", type=Path, default=RESULTS / "schedule.json", help="where the JSON goes")
    given = parser.parse_args()
    rows = []
    for stages in given.stages:
        for num_devices in given.devices:
            for row in cases(stages, num_devices, given.steps):
                rows.append(row)
                print(_line(row), flush=True)
    write_record(given.output, rows, steps=given.steps)
    given.output.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")


def cases(stages: str, num_devices: int, steps: int) -> Iterator[dict[str, Any]]:
    """The best of every limit from 1 to ``num_devices`` microbatches. Bubbles are in seconds, or ticks."""
    costs = STAGES[stages](2 * num_devices)
    num_microbatches = 3 * num_devices
    starts: tuple[Any, ...] = ()
    for limit in range(1, num_devices + 1):
        began = time.process_time()
        found = search(
            costs,
            num_devices,
            num_microbatches,
            limit_microbatches=limit,
            starts=starts,
            steps=steps,
            time_limit_seconds=3600,
        )
        starts = (found.schedule,)
        work = max(costs.stages[i].work_seconds + costs.stages[-1 - i].work_seconds for i in range(num_devices))
        work *= num_microbatches
        yield {
            "stages": stages,
            "num_devices": num_devices,
            "num_microbatches": num_microbatches,
            "limit_microbatches": limit,
            "work_seconds": work,
            "found": found.timeline.step_seconds - work,
            "origin": found.origin,
            "bound": max(found.bound_seconds, found.published_bound_seconds) - work,
            "gap": found.gap,
            "named": {name: seconds - work for name, seconds in found.named_seconds.items()},
            "cpu_seconds": time.process_time() - began,
        }


def _line(row: dict[str, Any]) -> str:
    named = " ".join(f"{name} {bubble:.0f}" for name, bubble in row["named"].items())
    return (
        f"{row['stages']:6} p={row['num_devices']:<2} k={row['limit_microbatches']:<2} found {row['found']:.1f} "
        f"bound {row['bound']:.1f} ({row['origin']}, {row['cpu_seconds']:.1f} CPU s) {named}"
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table for each kind of stages and number of devices."""
    lines = [
        "# Pipeline schedules within a limit",
        "",
        "Bubble: step time less the work of the busiest device in a V. Limit: microbatches' activations per device, of",
        "m = 3p microbatches. Bound: the larger of what is proved here and max(p−1, 6p−1−6k) of the paper on V shapes,",
        "which is for equal times. Named schedules are listed where they fit. Made by `python -m benchmarks.schedule`.",
    ]
    for stages in dict.fromkeys(row["stages"] for row in rows):
        for num_devices in dict.fromkeys(row["num_devices"] for row in rows):
            table = [row for row in rows if (row["stages"], row["num_devices"]) == (stages, num_devices)]
            if table:
                lines += ["", f"## {TITLES[stages]}, p = {num_devices}", "", *_table(table)]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"| limit | found | bound | gap | by | {' | '.join(NAMES)} |"
    yield "|---" * (5 + len(NAMES)) + "|"
    for row in rows:
        named = " | ".join(f"{row['named'][name]:.0f}" if name in row["named"] else "" for name in NAMES)
        yield (
            f"| {row['limit_microbatches']} | **{row['found']:.0f}** | {row['bound']:.0f} | {row['gap']:.1%} | "
            f"{row['origin']} | {named} |"
        )


if __name__ == "__main__":
    main()
