"""A linear layer and its cross entropy: whole, in our chunks, and in torch's own (2.13 on), in turns in one process.

    python -m benchmarks.head                       float32, about five minutes on two cores
    python -m benchmarks.head --tokens 2048 --features 256 --rounds 3

Peaks are bytes above the inputs, as torch's allocator reports them; seconds are ratios of medians to the plain way's.
Errors are relative to the plain way: of the loss, and of the gradients by norm. Writes benchmarks/results/head.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.record import write_record
from stowplan import linear_cross_entropy
from stowplan.core.units import format_bytes
from stowplan.offload.memory_log import memory_log

CLASSES = 32_000
CHUNKS = (128, 512, 2048)
SIZES = ((2048, 256), (4096, 512))
RESULT = Path(__file__).parent / "results" / "head.json"

Way = Callable[[], torch.Tensor]


def ways(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> dict[str, Way]:
    def plain() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), target)

    def ours(chunk_rows: int) -> Way:
        return lambda: linear_cross_entropy(hidden, weight, target, chunk_rows=chunk_rows)

    found: dict[str, Way] = {"plain": plain}
    found |= {f"ours, {rows} rows": ours(rows) for rows in CHUNKS if rows < len(hidden)}
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)

    def of_torch(chunk_rows: int, policy: str) -> Way:
        chosen = options(batch_chunk_size=chunk_rows, acc_policy=policy)
        return lambda: F.linear_cross_entropy(hidden, weight, target, options=chosen)

    if options is not None:
        found["torch, as it chooses"] = lambda: F.linear_cross_entropy(hidden, weight, target, options=options())
        found |= {f"torch compact, {rows} rows": of_torch(rows, "compact") for rows in CHUNKS if rows < len(hidden)}
    return found


def step(way: Way, inputs: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    start = time.perf_counter()
    loss = way()
    gradients = torch.autograd.grad(loss, inputs)
    return time.perf_counter() - start, [loss.detach(), *gradients]


def peak_bytes(way: Way, inputs: list[torch.Tensor]) -> int:
    with memory_log(inputs[0].device) as log:
        step(way, inputs)
    return max(segment.peak_bytes for segment in log.segments)


def compare(tokens: int, features: int, rounds: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, features).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(CLASSES, features)).to(dtype).requires_grad_()
    target = torch.randint(CLASSES, (tokens,)).masked_fill(torch.rand(tokens) < 0.1, -100)
    contenders, inputs = ways(hidden, weight, target), [hidden, weight]
    _, expected = step(contenders["plain"], inputs)
    errors: dict[str, list[float]] = {}
    for name, way in contenders.items():
        _, found = step(way, inputs)
        errors[name] = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    del expected, found
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, way in contenders.items():
            times[name].append(step(way, inputs)[0])
    plain_seconds = statistics.median(times["plain"])
    peaks = {name: peak_bytes(way, inputs) for name, way in contenders.items()}
    return [
        {
            "tokens": tokens,
            "features": features,
            "classes": CLASSES,
            "dtype": str(dtype).removeprefix("torch."),
            "way": name,
            "peak_bytes": peaks[name],
            "peak_ratio": round(peaks[name] / peaks["plain"], 4),
            "seconds_ratio": round(statistics.median(times[name]) / plain_seconds, 3),
            "loss_error": errors[name][0],
            "gradient_error": max(errors[name][1:]),
        }
        for name in contenders
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    sizes = SIZES if arguments.tokens is None else ((arguments.tokens, arguments.features),)
    rows = []
    for tokens, features in sizes:
        for row in compare(tokens, features, arguments.rounds, getattr(torch, arguments.dtype)):
            rows.append(row)
            print(
                f"{tokens}x{features} {row['way']:24} peak {format_bytes(row['peak_bytes']):>11} "
                f"({row['peak_ratio']:.2f})  time {row['seconds_ratio']:.2f}  loss {row['loss_error']:.0e}  "
                f"gradients {row['gradient_error']:.0e}"
            )
    write_record(arguments.out, rows, rounds=arguments.rounds, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
