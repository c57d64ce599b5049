"""Reserved beside allocated bytes, and step time, of training with batches of varying length on one CUDA device.

    python -m benchmarks.arena_gpu                          torch's allocator, expandable segments, the arena
    python -m benchmarks.arena_gpu --limit 40GiB            near a limit: which of them still finish

Each contender trains in a process of its own, one after the other, with the same batches. ``--limit`` takes the rest of
the device's memory away before training begins. Nothing in ``benchmarks/results`` comes from this yet: it has not been
run on a device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import write_record
from stowplan.core.units import format_bytes, parse_bytes

CONTENDERS = {"torch": "", "expandable segments": "expandable_segments:True", "arena": ""}


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.contender:
        print(json.dumps(_train(arguments)))
        return
    rows = [_run(name, sys.argv[1:]) for name in CONTENDERS]
    for row in rows:
        if row["finished"]:
            print(
                f"{row['contender']:20} step {row['step_seconds']:.3f} s  reserved {format_bytes(row['reserved'])}  "
                f"live peak {format_bytes(row['peak'])}  reserved / live {row['reserved'] / row['peak']:.3f}"
            )
        else:
            print(f"{row['contender']:20} {row['error']}")
    write_record(Path(arguments.out), rows, arguments=vars(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 3072, 2048, 4096, 1536, 3584])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--limit", help="memory of the device that may be used, such as 40GiB")
    parser.add_argument("--out", default="benchmarks/results/arena_gpu.json")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    return parser


def _run(name: str, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.arena_gpu", *options, "--contender", name]
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": CONTENDERS[name], "PYTORCH_CUDA_ALLOC_CONF": CONTENDERS[name]}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"contender": name, "finished": False, "error": said[-1] if said else "ended without a word"}
    return {"contender": name, "finished": True, **json.loads(done.stdout.splitlines()[-1])}


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    import stowplan
    from stowplan.offload import cuda_memory

    device = torch.device("cuda", 0)
    served = arguments.contender == "arena"
    if served:
        stowplan.arena.install("cuda:0", strict=True, most_plans=len(arguments.lengths))
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.cuda.init()
    taken = None
    if arguments.limit:
        free, _ = torch.cuda.mem_get_info(device)
        taken = torch.empty(max(free - parse_bytes(arguments.limit), 0), dtype=torch.uint8, device=device)
    held = 0 if taken is None else taken.nbytes
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 4,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.hidden // 64,
        max_position_embeddings=max(arguments.lengths),
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds: list[float] = []
    for step in range(arguments.steps):
        length = arguments.lengths[step % len(arguments.lengths)]
        ids = torch.randint(32000, (arguments.batch, length), device=device)
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    warm = seconds[len(seconds) // 2 :]
    counted = stowplan.arena.stats() if served else None
    return {
        "step_seconds": statistics.median(warm),
        "reserved": cuda_memory.reserved_bytes(device) - held,
        "peak": cuda_memory.peak_bytes(device) - held,
        "hits": counted and counted.hits,
        "misses": counted and counted.misses,
        "planning_seconds": counted and counted.planning_seconds,
    }


if __name__ == "__main__":
    main()
