"""What hooks cost in the steady state: a model so small that Python, not kernels, takes the time.

Contenders run in turn, round by round, in one process; medians of single-thread CPU seconds are compared with the plain
model's. ``python -m benchmarks.overhead --help``
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.record import write_record
from stowplan import session
from stowplan.core.program import Action
from stowplan.offload.blocks import find_blocks
from stowplan.offload.copies import PlainCopies
from stowplan.offload.engine import Engine, PlannedBlock
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.tape.checks import Checks
from stowplan.offload.tape.run import Counters


def tiny_llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=3, intermediate_size=56, vocab_size=64, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def hooked(action: Action) -> Callable[[torch.nn.Module], None]:
    """Every block hooked, also where all is kept, which a plan would not touch."""

    def apply(model: torch.nn.Module) -> None:
        (program,) = session.plan(tiny_llama(), make_batch(), budget="1GiB").step.programs
        values = [program.values[i] for i in program.saved]
        planned = {value.name: action if action in value.actions else Action.SWAP for value in values}
        copies, counters = PlainCopies(HostSlab(1 << 26)), Counters()
        for block in find_blocks(model):
            hooks = PlannedBlock(block, [planned], copies, counters, Checks())
            hooks.untouched.clear()  # a block that keeps everything is left alone otherwise

    return apply


def make_batch() -> dict[str, Any]:
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def untouched(model: torch.nn.Module) -> None:
    blocks = find_blocks(model)
    Engine(model, blocks, [{}] * len(blocks), PlainCopies(HostSlab(1)))


def null_hooks(model: torch.nn.Module) -> None:
    for _, block in find_blocks(model):
        forward = block.forward

        def with_hooks(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                return forward(*args, **kwargs)

        block.forward = with_hooks


def checkpointed(model: torch.nn.Module) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


CONTENDERS: dict[str, Callable[[torch.nn.Module], None]] = {
    "plain": lambda model: None,
    "plan that keeps everything": untouched,
    "null hooks": null_hooks,
    "all KEEP, hooked": hooked(Action.KEEP),
    "all SWAP": hooked(Action.SWAP),
    "all RECOMPUTE": hooked(Action.RECOMPUTE),
    "torch.utils.checkpoint": checkpointed,
}


def step(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[float, float]:
    start = time.thread_time()
    loss = model(**batch).loss
    middle = time.thread_time()
    loss.backward()
    return middle - start, time.thread_time() - middle


def run(num_rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    models = {name: tiny_llama() for name in CONTENDERS}
    for name, prepare in CONTENDERS.items():
        prepare(models[name])
    batch = make_batch()
    for model in models.values():
        for _ in range(5):
            step(model, batch)
    gc.collect()
    gc.disable()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(num_rounds):
        for name, model in models.items():
            times[name].append(step(model, batch))
    gc.enable()
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    plain = sum(medians["plain"])
    return [
        {
            "contender": name,
            "forward_us": round(forward * 1e6),
            "backward_us": round(backward * 1e6),
            "over_plain_percent": round(100 * ((forward + backward) / plain - 1), 1),
        }
        for name, (forward, backward) in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="steps of each contender")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.json"))
    arguments = parser.parse_args()
    rows = run(arguments.rounds)
    print(f"{'contender':<28}{'forward us':>12}{'backward us':>13}{'over plain':>12}")
    for row in rows:
        print(
            f"{row['contender']:<28}{row['forward_us']:>12}{row['backward_us']:>13}{row['over_plain_percent']:>+11.1f}%"
        )
    write_record(arguments.out, rows)


if __name__ == "__main__":
    main()
