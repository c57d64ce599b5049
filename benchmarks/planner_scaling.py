"""How long a plan takes and how good it is: up to 96 blocks of 16 saved values, on quick and slow links.

    python -m benchmarks.planner_scaling                    # the whole grid, about half an hour
    python -m benchmarks.planner_scaling --blocks 96 --links 50 --models 8b-128k

Every case prints the wall seconds of ``solve`` (bound and least budget included), the gap to the bound, step time over
that of a device without limits (ideal), and that of every baseline that fits. Programs are analytic (roofline of an
H100-like device): compare ratios, promise nothing. Results go to benchmarks/results/planner_scaling.{json,md}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from benchmarks.analytic import analytic_llama, with_rows
from stowplan.core.errors import InfeasibleBudget
from stowplan.core.hardware import preset
from stowplan.core.program import Split, StepProgram
from stowplan.planner.activations import Problem, policies, simulate, solve

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "8b-128k": {"hidden": 4096, "kv_ratio": 0.25, "sequence": 131072, "num_devices": 8, "static_bytes": 16 * 10**9},
    "8b-32k": {"hidden": 4096, "kv_ratio": 0.25, "sequence": 32768, "num_devices": 2, "static_bytes": 64 * 10**9},
    "70b-128k": {"hidden": 8192, "kv_ratio": 0.125, "sequence": 131072, "num_devices": 32, "static_bytes": 35 * 10**9},
}
# (device budget beyond one block, host budget), both as shares of what all blocks save
VALUES = {"whole": lambda step: step, "rows": with_rows}
BUDGETS = ((0.03, 9.0), (0.25, 9.0), (0.6, 9.0), (0.05, 0.3))
TARGET_SECONDS, TARGET_GAP = 5.0, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 80, 96], help="numbers of blocks")
    parser.add_argument("--links", type=float, nargs="+", default=[50, 25, 12], help="GB/s to and from the host")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="analytic models")
    parser.add_argument(
        "--values", nargs="+", choices=VALUES, default=list(VALUES), help="whole values, or by rows too"
    )
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds given to each plan")
    parser.add_argument("--output", type=Path, default=RESULTS / "planner_scaling.json", help="where the JSON goes")
    given = parser.parse_args()
    rows = []
    for model in given.models:
        for num_blocks in given.blocks:
            step = analytic_llama(num_blocks=num_blocks, **MODELS[model])  # type: ignore[arg-type]
            for row in _cases(step, given.links, given.values, given.time_limit):
                rows.append({"model": model, "blocks": num_blocks, **row})
                print(_line(rows[-1]), flush=True)
    summary = summarise(rows)
    print("\n".join(summary))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps({**_machine(), "summary": summary, "cases": rows}, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(_markdown(rows, summary))


def _cases(step: StepProgram, links: list[float], values: list[str], time_limit: float) -> Iterator[dict[str, object]]:
    """Plan ``step`` for every link, kind of copies, pair of budgets and kind of values, these in turn."""
    steps = {name: VALUES[name](step) for name in values}
    block_bytes = step.programs[0].saved_bytes
    all_bytes = step.num_blocks * block_bytes
    for link in links:
        for overlapped in (True, False):
            hardware = replace(
                preset("h100-sxm"),
                to_host_bytes_per_second=link * 1e9,
                to_device_bytes_per_second=link * 1e9,
                overlapped_copies=overlapped,
            )
            free = Problem(step=step, hardware=hardware, budget_bytes=10**15, host_budget_bytes=10**15)
            everything = simulate(free, policies.keep_all(free)).peak_bytes
            for (device_share, host_share), (kind, kind_of_step) in itertools.product(BUDGETS, steps.items()):
                budget = int(everything - (1 - device_share) * all_bytes + block_bytes)
                case = {"link": link, "overlapped": overlapped, "device": device_share, "host": host_share}
                case["values"] = kind
                host_budget = int(host_share * all_bytes)
                began = time.perf_counter()
                try:
                    plan = solve(kind_of_step, hardware, budget, host_budget, time_limit_seconds=time_limit)
                except InfeasibleBudget as error:
                    yield {**case, "infeasible": error.least_bytes / budget, "seconds": time.perf_counter() - began}
                    continue
                ideal = plan.unplanned.step_seconds
                yield {
                    **case,
                    "seconds": time.perf_counter() - began,
                    "gap": plan.solution.gap,
                    "proof": plan.solution.proof,
                    "over_ideal": plan.prediction.step_seconds / ideal,
                    "bound_over_ideal": plan.solution.bound_seconds / ideal,
                    "peak_of_budget": plan.prediction.peak_bytes / budget,
                    "splits": sum(isinstance(decision, Split) for chosen in plan.decisions for decision in chosen),
                    "baselines_over_ideal": {
                        b.name: b.prediction.step_seconds / ideal if b.fits else None for b in plan.baselines
                    },
                }


def _line(row: dict[str, object]) -> str:
    copies = "overlapped" if row["overlapped"] else "blocking"
    where = f"{row['model']:9} {row['blocks']:3} blocks {row['link']:3g} GB/s {copies:10}"
    head = f"{where} {row['device']:.2f}/{row['host']:.1f} {row['values']:5}"
    if "infeasible" in row:
        return f"{head} | infeasible: least is {row['infeasible']:.3f} of the budget"
    others = {n: t for n, t in row["baselines_over_ideal"].items() if t}  # type: ignore[attr-defined]
    text = " ".join(f"{name} {ratio:.3f}" for name, ratio in others.items())
    return (
        f"{head} | {row['seconds']:.2f} s gap {row['gap']:.2%} {row['proof']:10} plan {row['over_ideal']:.4f} "
        f"splits {row['splits']:4} | {text}"
    )


def summarise(rows: list[dict[str, object]]) -> list[str]:
    """Per link and kind of copies: wall seconds, gaps, and the plan against the best baseline that fits."""
    lines = [
        "| link GB/s | copies | values | cases | seconds median / worst | gap median / worst | within 1% "
        "| plan ÷ best baseline, geometric mean / best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kinds = ("link", "overlapped", "values")
    for kind in dict.fromkeys(tuple(row[key] for key in kinds) for row in rows):
        cases = [row for row in rows if tuple(row[key] for key in kinds) == kind and "gap" in row]
        if not cases:
            continue
        seconds, gaps = sorted(r["seconds"] for r in cases), sorted(r["gap"] for r in cases)  # type: ignore[type-var]
        ratios = []
        for row in cases:
            fitting = [t for t in row["baselines_over_ideal"].values() if t]  # type: ignore[attr-defined]
            if fitting:
                ratios.append(row["over_ideal"] / min(fitting))  # type: ignore[operator]
        product = 1.0
        for ratio in ratios:
            product *= ratio ** (1 / len(ratios))
        within = sum(gap <= TARGET_GAP for gap in gaps)  # type: ignore[operator]
        middle = len(cases) // 2
        lines.append(
            f"| {kind[0]:g} | {'overlapped' if kind[1] else 'blocking'} | {kind[2]} | {len(cases)} "
            f"| {seconds[middle]:.2f} / {seconds[-1]:.2f} | {gaps[middle]:.2%} / {gaps[-1]:.2%} "
            f"| {within} of {len(cases)} | {product:.4f} / {min(ratios, default=1):.4f} |"
        )
    lines += ["", *_rows_against_whole(rows)]
    late = sum(row["seconds"] > TARGET_SECONDS for row in rows)  # type: ignore[operator]
    return [*lines, "", f"{late} of {len(rows)} cases took longer than {TARGET_SECONDS:g} s."]


def _rows_against_whole(rows: list[dict[str, object]]) -> list[str]:
    """One line on step times with rows over those of whole values, where both were planned."""
    times: dict[tuple[object, ...], dict[object, float]] = {}
    for row in rows:
        if "over_ideal" in row:
            case = tuple(row[key] for key in ("model", "blocks", "link", "overlapped", "device", "host"))
            times.setdefault(case, {})[row["values"]] = row["over_ideal"]  # type: ignore[assignment]
    ratios = sorted(pair["rows"] / pair["whole"] for pair in times.values() if len(pair) == len(VALUES))
    if not ratios:
        return []
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    faster = sum(ratio < 1 - 1e-4 for ratio in ratios)
    return [
        f"Step with rows over that of whole values: geometric mean {mean:.4f}, best {ratios[0]:.4f}, "
        f"worst {ratios[-1]:.4f}; faster in {faster} of {len(ratios)} cases."
    ]


def _markdown(rows: list[dict[str, object]], summary: list[str]) -> str:
    command = " ".join(["python -m benchmarks.planner_scaling", *sys.argv[1:]])
    machine = ", ".join(f"{key} {value}" for key, value in _machine().items() if key != "versions")
    body = [
        "# Planner scaling",
        "",
        f"Made by `{command}` ({machine}, shared with other work).",
        "Step times are over the ideal (no limits). *rows*: every value may be swapped by rows, and what is row-wise",
        "may be recomputed for its first 1/16, 2/16 … of them.",
        "",
        *summary,
        "",
        "```",
        *(_line(row) for row in rows),
        "```",
    ]
    return "\n".join(body) + "\n"


def _machine() -> dict[str, object]:
    """What the figures were made on."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("pulp", "highspy")},
        "commit": commit or "none",
    }


if __name__ == "__main__":
    main()
