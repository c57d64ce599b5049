"""Who packs how tightly, and how fast: ours beside the packers that are installed, problem by problem, in one process.

    python -m benchmarks.packing                          # everything, about half an hour
    python -m benchmarks.packing --families dsa churn --time-limit 10
    python -m benchmarks.packing --minimalloc PATH        # its command-line program, built by hand

Families: ``dsa``, six problems of minimalloc with a capacity; ``variants`` of these that can be packed by construction
(warped or reversed time, buffers removed, or cut into two); ``steps``, training steps of Llama, GPT-2, ViT and T5 with
everything kept and under a plan, whose segments are known, so that the bi-level solver packs them, too; ``churn``,
unstructured lifetimes and sizes; ``layers``, made up like a step, and as long as wished. With a capacity the question
is whether it is met in time, without, how far the height is from the bound. Every answer is checked. omnimalloc takes
part when it is installed (``pip install omnimalloc``; greedy by size, and its own choice, on one thread). Results go to
benchmarks/results/packing.json.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import write_record
from benchmarks.step_traces import BLOCKS, step_traces
from stowplan.planner.addresses import ALIGNMENT_BYTES, packing_problem
from stowplan.planner.packing import Problem, pack, validate
from stowplan.planner.packing.library import library
from stowplan.planner.packing.segments import Segments

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DSA = ROOT / "tests" / "data" / "dsa"
CAPACITY = 1048576
BILEVEL = "stowplan bilevel"


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    problem: Problem
    capacity_bytes: int | None = None
    segments: Segments | None = None


Packer = Callable[[Case, float], Any]  # offsets, or None: no answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="kinds of problems")
    parser.add_argument("--time-limit", type=float, default=20.0, help="wall seconds for each packer and problem")
    parser.add_argument("--churn", type=int, nargs="+", default=[20_000, 100_000], help="buffers of churn and layers")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, help="depths of the steps' models")
    parser.add_argument("--variants", type=int, default=1, help="of each kind, of each of the six problems")
    parser.add_argument("--seed", type=int, default=0, help="of variants and churn")
    parser.add_argument("--minimalloc", type=Path, help="minimalloc's program")
    parser.add_argument("--output", type=Path, default=RESULTS / "packing.json", help="where the JSON goes")
    given = parser.parse_args()
    packers = available(given.minimalloc)
    library()  # compiled before the clock runs
    rows = []
    for family in given.families:
        for case in FAMILIES[family](given):
            for name, packer in packers.items():
                row = measure(case, name, packer, given.time_limit)
                if row is not None:
                    rows.append(row)
                    print(line(row), flush=True)
    summary = summarise(rows)
    print("\n".join(summary))
    options = {"time_limit_seconds": given.time_limit, "seed": given.seed}
    write_record(given.output, rows, options=options, summary=summary)


def measure(case: Case, name: str, packer: Packer, time_limit_seconds: float) -> dict[str, Any] | None:
    if (name == "minimalloc" and case.capacity_bytes is None) or (name == BILEVEL and case.segments is None):
        return None
    wall, cpu = time.perf_counter(), cpu_seconds()
    offsets = packer(case, time_limit_seconds)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    row: dict[str, Any] = {"family": case.family, "problem": case.name, "buffers": len(case.problem), "packer": name}
    row |= {"wall_seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), "over_bound": None, "fits": None}
    if offsets is None:
        return row | {"fits": False}
    assert validate(case.problem, offsets) is None, f"{name} on {case.name}"
    height = int((offsets + case.problem.aligned_size).max())
    row["over_bound"] = height / case.problem.bound_bytes
    if case.capacity_bytes is not None:
        row["fits"] = height <= case.capacity_bytes
    return row


def cpu_seconds() -> float:
    """Of this process and of the programs that it has run."""
    times = os.times()
    return float(times.user + times.system + times.children_user + times.children_system)


def line(row: dict[str, Any]) -> str:
    ratio = "" if row["over_bound"] is None else f"{row['over_bound']:.5f}"
    fits = "" if row["fits"] is None else "fits" if row["fits"] else "does not fit"
    where = f"{row['family']:9}{row['problem']:18}{row['buffers']:7} {row['packer']:26}"
    return f"{where}{ratio:9} {row['wall_seconds']:8.2f} s wall {row['cpu_seconds']:8.2f} s CPU  {fits}"


def summarise(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        for packer in dict.fromkeys(row["packer"] for row in rows):
            mine = [row for row in rows if (row["family"], row["packer"]) == (family, packer)]
            if not mine:
                continue
            cpu = [row["cpu_seconds"] for row in mine]
            if mine[0]["fits"] is not None:
                said = f"{sum(row['fits'] for row in mine)} of {len(mine)} fit"
                solved = [row["cpu_seconds"] for row in mine if row["fits"]]
                within = ", ".join(f"{sum(s <= limit for s in solved)} in {limit} s CPU" for limit in (1, 5, 20, 60))
                said += f" ({within})"
            else:
                ratios = [row["over_bound"] for row in mine]
                said = f"over bound: median {statistics.median(ratios):.5f}, worst {max(ratios):.5f}"
            lines.append(
                f"{family:9} {packer:26} {said}; {statistics.median(cpu):.2f} s CPU median, {max(cpu):.2f} most"
            )
    return lines


def available(minimalloc: Path | None) -> dict[str, Packer]:
    packers: dict[str, Packer] = {"stowplan greedy": ours("greedy"), "stowplan auto": ours("auto")}
    packers[BILEVEL] = ours("bilevel")
    if importlib.util.find_spec("omnimalloc"):
        packers |= {f"omnimalloc {name}": omnimalloc(name) for name in ("greedy_by_size", "omni")}
    if minimalloc is not None:
        packers["minimalloc"] = lambda case, limit: run_minimalloc(minimalloc, case, limit)
    return packers


def ours(solver: Any) -> Packer:
    def packer(case: Case, time_limit_seconds: float) -> Any:
        limit = {"capacity_bytes": case.capacity_bytes, "time_limit_seconds": time_limit_seconds}
        return pack(case.problem, solver=solver, segments=case.segments, **limit).offsets

    return packer


def omnimalloc(name: str) -> Packer:
    import omnimalloc as peer

    peer.set_max_threads(1)

    def packer(case: Case, time_limit_seconds: float) -> Any:
        p = case.problem
        numbers = zip(p.aligned_size.tolist(), p.lower.tolist(), p.upper.tolist(), strict=True)
        placed = peer.allocate([peer.Allocation(i, *each) for i, each in enumerate(numbers)], name)
        offsets = np.zeros(len(p), np.int64)
        for each in placed:
            offsets[each.id] = each.offset
        return offsets

    return packer


def run_minimalloc(program: Path, case: Case, time_limit_seconds: float) -> Any:
    p = case.problem
    with tempfile.TemporaryDirectory() as directory:
        given, found = Path(directory, "given.csv"), Path(directory, "found.csv")
        with given.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("id", "lower", "upper", "size"))
            writer.writerows(zip(range(len(p)), p.lower.tolist(), p.upper.tolist(), p.size.tolist(), strict=True))
        limits = (f"--capacity={case.capacity_bytes}", f"--timeout={time_limit_seconds:g}s")
        command = (str(program), *limits, f"--input={given}", f"--output={found}")
        subprocess.run(command, check=False, capture_output=True, timeout=10 * time_limit_seconds + 60)
        if not found.exists():
            return None
        offsets = np.zeros(len(p), np.int64)
        with found.open() as file:
            for row in csv.DictReader(file):
                offsets[int(row["id"])] = int(row["offset"])
    return offsets


def dsa(given: argparse.Namespace) -> Iterator[Case]:
    for file in sorted(DSA.glob("*.csv")):
        with file.open() as text:
            rows = list(csv.DictReader(text))
        columns = (np.array([int(row[key]) for row in rows]) for key in ("lower", "upper", "size"))
        yield Case("dsa", file.name[0], Problem(*columns), CAPACITY)


def variants(given: argparse.Namespace) -> Iterator[Case]:
    for case in dsa(given):
        for place, (kind, change) in enumerate(KINDS.items()):
            for number in range(given.variants):
                random = np.random.default_rng([given.seed, ord(case.name), place, number])
                lower, upper, size = change(random, case.problem.lower, case.problem.upper, case.problem.size)
                order = random.permutation(len(lower))
                problem = Problem(lower[order], upper[order], size[order])
                yield Case("variants", f"{case.name} {kind} {number}", problem, CAPACITY)


def warped(random: np.random.Generator, lower: Any, upper: Any, size: Any) -> Any:
    times = np.unique(np.concatenate([lower, upper]))
    steps = np.diff(times, prepend=times[0]) * random.uniform(0.5, 2, len(times))
    moved = (np.cumsum(steps) + np.arange(len(times))).astype(np.int64)
    return moved[np.searchsorted(times, lower)], moved[np.searchsorted(times, upper)], size


def reversed_(random: np.random.Generator, lower: Any, upper: Any, size: Any) -> Any:
    return upper.max() - upper, upper.max() - lower, size


def removed(random: np.random.Generator, lower: Any, upper: Any, size: Any) -> Any:
    stays = random.random(len(lower)) > 0.1
    return lower[stays], upper[stays], size[stays]


def cut(random: np.random.Generator, lower: Any, upper: Any, size: Any) -> Any:
    which = np.flatnonzero((random.random(len(lower)) < 0.15) & (upper - lower > 2))
    at = random.integers(lower[which] + 1, upper[which])
    upper_first = upper.copy()
    upper_first[which] = at
    both = (lower, at), (upper_first, upper[which]), (size, size[which])
    return tuple(np.concatenate(pair) for pair in both)


KINDS = {
    "permuted": lambda random, *given: given,
    "warped": warped,
    "reversed": reversed_,
    "removed": removed,
    "cut": cut,
}


def steps(given: argparse.Namespace) -> Iterator[Case]:
    for name, trace, device in step_traces(blocks=given.blocks):
        edges = [mark.event for mark in trace.marks]
        segments = [(lower, upper) for lower, upper in pairwise(edges) if lower < upper]
        yield Case("steps", name, packing_problem(trace, ALIGNMENT_BYTES[device]), segments=segments)


def churn(given: argparse.Namespace) -> Iterator[Case]:
    for count in given.churn:
        for place, (name, (lifetimes, sizes)) in enumerate(CHURN.items()):
            random = np.random.default_rng([given.seed, place, count])
            lower = random.integers(0, 4 * count, count)
            lifetime, size = lifetimes(random, count), sizes(random, count)
            yield Case("churn", name, Problem(lower, lower + lifetime.astype(np.int64), size.astype(np.int64)))


CHURN: dict[str, Any] = {
    "uniform": (lambda r, n: r.integers(1, 800, n), lambda r, n: r.integers(1, 4096, n) * 256),
    "uniform, denser": (lambda r, n: r.integers(1, 3200, n), lambda r, n: r.integers(1, 4096, n) * 256),
    "powers of two": (lambda r, n: 1 + r.lognormal(5, 1.2, n), lambda r, n: 2 ** r.integers(9, 22, n)),
    "exponential": (lambda r, n: 1 + r.exponential(300, n), lambda r, n: 512 * (1 + r.exponential(400, n)).astype(int)),
    "log-normal": (lambda r, n: 1 + r.lognormal(5, 1.5, n), lambda r, n: 256 * (1 + r.lognormal(5, 1, n)).astype(int)),
}


def layers(given: argparse.Namespace) -> Iterator[Case]:
    """Forward and backward through layers: some buffers of each live from one to the other, the rest inside either."""
    for count in given.churn:
        random = np.random.default_rng([given.seed, count])
        inside, kept = 12, 6
        num_layers = count // (2 * inside + kept)
        sizes, begins = random.integers(1, 2000, 2 * inside + kept) * 512, random.integers(0, 20, 2 * inside)
        lengths = random.integers(1, 8, 2 * inside)
        lower: list[int] = []
        upper: list[int] = []
        size: list[int] = []
        for layer in range(num_layers):
            forward, backward = 32 * layer, 32 * (2 * num_layers - 1 - layer)
            for k in range(2 * inside):
                begin = int((forward if k < inside else backward) + begins[k])
                lower.append(begin)
                upper.append(begin + int(lengths[k]))
            lower += range(forward, forward + kept)
            upper += range(backward + 2, backward + 2 + kept)
            size += sizes.tolist()
        yield Case("layers", f"{num_layers} layers", Problem(np.array(lower), np.array(upper), np.array(size)))


FAMILIES: dict[str, Callable[[argparse.Namespace], Iterator[Case]]] = {
    "dsa": dsa,
    "variants": variants,
    "steps": steps,
    "churn": churn,
    "layers": layers,
}

if __name__ == "__main__":
    main()
