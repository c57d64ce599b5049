"""Our pipelines beside torch's runtimes: peaks of every process, how long steps take, and what was predicted.

    python -m benchmarks.pipeline                    # about ten minutes on two cores
    python -m benchmarks.pipeline --quick            # only to see that it runs

Processes talk over gloo on this machine. Peaks: a Hugging Face Llama of two layers a device, the same stages and
microbatches for all, live bytes of the second step. Makespans: stages that sleep instead of computing, so that more
processes than cores do not matter; predicted by the simulator. Times of real steps: two processes, in turns. torch's
runtimes do not scale gradients and keep no outputs. Results go to benchmarks/results/pipeline.{json,md}.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pipeline_ranks import OURS, THEIRS, Setting, makespans, on_ranks, peaks, seconds
from benchmarks.record import write_record
from stowplan.planner.schedule import Costs, generate, simulate

RESULTS = Path(__file__).parent / "results"
NAMES = (*OURS, *THEIRS)
RIVALS = {"v-zb": "torch ZBV", "1f1b": "torch 1F1B", "interleaved": "torch Interleaved1F1B"}
_REST = "torch ZBV", "torch 1F1B"
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[4, 8], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender")
    parser.add_argument("--quick", action="store_true", help="two processes, tiny sizes, one round")
    parser.add_argument("--output", type=Path, default=RESULTS / "pipeline.json", help="where the JSON goes")
    given = parser.parse_args()
    sizes, rounds = ([2], 1) if given.quick else (given.processes, given.rounds)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        rows += [*of_peaks(size, _setting(size, given.quick)), *of_makespans(size, _setting(size, given.quick), rounds)]
    rows += of_seconds(_setting(2, given.quick), 1 if given.quick else 4 * rounds)
    text = markdown(rows)
    print(text)
    write_record(given.output, rows, rounds=rounds)
    given.output.with_suffix(".md").write_text(text, encoding="utf-8")


def _setting(size: int, quick: bool) -> Setting:
    if quick:
        return Setting(2 * size, hidden=16, sequence=8, rows=1, sleeps=(0.001, 0.001, 0.001))
    return Setting(3 * size)


def of_peaks(size: int, setting: Setting) -> Iterator[dict[str, Any]]:
    """Bytes of each process."""
    answers = on_ranks(size, peaks, NAMES, setting)
    for name in NAMES:
        yield {
            "what": "peak",
            "processes": size,
            "microbatches": setting.num_microbatches,
            "contender": name,
            "bytes": [answer[name] for answer in answers],
        }


def of_makespans(size: int, setting: Setting, num_rounds: int) -> Iterator[dict[str, Any]]:
    """The slowest process's seconds, median of rounds, and what the simulator says of our schedules."""
    answers = on_ranks(size, makespans, NAMES, setting, num_rounds)
    work = 2 * setting.num_microbatches * sum(setting.sleeps)
    for name in NAMES:
        rounds = [max(of_rank) for of_rank in zip(*(answer[name] for answer in answers), strict=True)]
        yield {
            "what": "makespan",
            "processes": size,
            "microbatches": setting.num_microbatches,
            "contender": name,
            "seconds": statistics.median(rounds),
            "work_seconds": work,
            "predicted_seconds": _predicted(name, size, setting),
        }


def _predicted(name: str, size: int, setting: Setting) -> float | None:
    own = "v-half" if name == "torch runtime, our v-half" else name
    if own not in OURS:
        return None
    schedule = generate(own, size, setting.num_microbatches)
    costs = Costs.uniform(2 * size, setting.sleeps)
    return simulate(schedule, costs.merged(2 * size // schedule.num_stages)).step_seconds


def of_seconds(setting: Setting, num_rounds: int) -> Iterator[dict[str, Any]]:
    """Real steps of two processes, in turns."""
    answers = on_ranks(2, seconds, NAMES, setting, num_rounds)
    for name in NAMES:
        rounds = [max(of_rank) for of_rank in zip(*(answer[name] for answer in answers), strict=True)]
        yield {
            "what": "step",
            "processes": 2,
            "microbatches": setting.num_microbatches,
            "contender": name,
            "seconds": statistics.median(rounds),
        }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """All tables."""
    lines = [
        "# Pipelines beside torch's runtimes",
        "",
        "Made by `python -m benchmarks.pipeline`; sizes and settings are in its text.",
    ]
    for size in dict.fromkeys(row["processes"] for row in rows if row["what"] == "peak"):
        lines += ["", *_peaks([row for row in rows if row["what"] == "peak" and row["processes"] == size])]
        lines += ["", *_makespans([row for row in rows if row["what"] == "makespan" and row["processes"] == size])]
    lines += ["", *_steps([row for row in rows if row["what"] == "step"])]
    return "\n".join(lines) + "\n"


def _head(rows: Sequence[dict[str, Any]]) -> str:
    return f"{rows[0]['processes']} processes, {rows[0]['microbatches']} microbatches"


def _peaks(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    highest = {row["contender"]: max(row["bytes"]) for row in rows}
    yield f"## Peak live bytes, {_head(rows)}"
    yield ""
    yield "MiB of each process: parameters, gradients, activations, buffers. Ratios are of the highest process."
    yield ""
    yield "| contender | each process | highest | ÷ torch ZBV | ÷ torch 1F1B |"
    yield "|---|---|---|---|---|"
    for row in rows:
        every = " ".join(f"{size / MIB:.2f}" for size in row["bytes"])
        top = highest[row["contender"]]
        ratios = " | ".join(f"{top / highest[rival]:.3f}" for rival in _REST)
        yield f"| {row['contender']} | {every} | {top / MIB:.2f} | {ratios} |"


def _makespans(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    spans = {row["contender"]: row["seconds"] for row in rows}
    yield f"## Makespan of stages that sleep, {_head(rows)}"
    yield ""
    yield "| contender | seconds | bubble | predicted | measured ÷ predicted | ÷ torch ZBV | ÷ torch 1F1B |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        predicted = row["predicted_seconds"]
        told = f"{predicted:.3f} | {row['seconds'] / predicted:.3f}" if predicted else " | "
        bubble = 1 - row["work_seconds"] / row["seconds"]
        ratios = " | ".join(f"{row['seconds'] / spans[rival]:.3f}" for rival in _REST)
        yield f"| {row['contender']} | {row['seconds']:.3f} | {bubble:.1%} | {told} | {ratios} |"


def _steps(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    spans = {row["contender"]: row["seconds"] for row in rows}
    yield f"## Real steps, {_head(rows)}"
    yield ""
    yield "| ours | torch's | ours ÷ torch's |"
    yield "|---|---|---|"
    for name, rival in {**RIVALS, "v-half": "torch runtime, our v-half"}.items():
        yield f"| {name} | {rival} | {spans[name] / spans[rival]:.3f} |"


if __name__ == "__main__":
    main()
