"""What a plan costs in the steady state, on models so small that Python, not kernels, takes the time.

Contenders run in turn, round by round, in one process; medians of single-thread CPU seconds are compared with the plain
model's, for a Llama with tiny layers. Then chains of short and of many ops tell what each saved tensor costs over hooks
that do nothing, and each call of a block beside. ``python -m benchmarks.overhead --help``
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.record import write_record
from stowplan import session
from stowplan.core.program import Action
from stowplan.offload.blocks import find_blocks
from stowplan.offload.copies import PlainCopies
from stowplan.offload.engine import Engine
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.planned_block import PlannedBlock
from stowplan.offload.tape.checks import Checks
from stowplan.offload.tape.replay import below_autograd
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
        plan = session.plan(model, make_batch(), budget="1GiB")
        copies, counters = PlainCopies(HostSlab(1 << 26)), Counters()
        for number, block in enumerate(find_blocks(model)):
            program = plan.step.program_of(number)
            values = [program.values[i] for i in program.saved]
            planned = {v.name: action if action in v.actions else Action.SWAP for v in values}
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


def take_turns(models: Mapping[Any, torch.nn.Module], num_rounds: int) -> dict[Any, tuple[float, float]]:
    """Median CPU seconds of forward and backward of each model."""
    batch = make_batch()
    for model in models.values():
        for _ in range(5):
            step(model, batch)
    gc.collect()
    gc.disable()
    times: dict[Any, list[tuple[float, float]]] = {key: [] for key in models}
    for _ in range(num_rounds):
        for key, model in models.items():
            times[key].append(step(model, batch))
    gc.enable()
    return {
        key: (statistics.median(row[0] for row in rows), statistics.median(row[1] for row in rows))
        for key, rows in times.items()
    }


def run(num_rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    models = {name: tiny_llama() for name in CONTENDERS}
    for name, prepare in CONTENDERS.items():
        prepare(models[name])
    medians = take_turns(models, num_rounds)
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


class Chain(torch.nn.Module):
    """A block that saves the input of each of its ``length`` ops."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        for _ in range(self.length):
            x = torch.nn.functional.silu(x)
        return x


class Chains(torch.nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Chain(length) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, **unused: Any) -> Any:
        x = input_ids.float()
        for block in self.blocks:
            x = block(x)
        return types.SimpleNamespace(loss=x.sum())


LENGTHS = (10, 60)
ITEMS = {
    "null hooks": null_hooks,
    "KEEP": hooked(Action.KEEP),
    "SWAP": hooked(Action.SWAP),
    "RECOMPUTE": hooked(Action.RECOMPUTE),
}


def run_items(num_rounds: int) -> list[dict[str, Any]]:
    """Microseconds for each saved tensor, and for each call of a block, over null hooks; kernels told apart."""
    torch.set_num_threads(1)
    models = {(name, length): Chains(length) for name in ITEMS for length in LENGTHS}
    for (name, _), model in models.items():
        ITEMS[name](model)
    medians = {key: 1e6 * sum(times) / 3 for key, times in take_turns(models, num_rounds).items()}
    rows = []
    copied, computed = _kernel_us(num_rounds)
    kernels = {"KEEP": 0.0, "SWAP": 2 * copied, "RECOMPUTE": computed}
    short, long = LENGTHS
    for name, kernel_us in kernels.items():
        few, many = (medians[name, length] - medians["null hooks", length] for length in LENGTHS)
        each = (many - few) / (long - short)
        rows.append(
            {
                "action": name,
                "per_tensor_us": round(each - kernel_us, 2),
                "kernel_us": round(kernel_us, 2),
                "per_call_us": round(few - short * each, 1),
            }
        )
    return rows


def _kernel_us(num_rounds: int) -> tuple[float, float]:
    """A copy of a saved tensor, and the op that makes it again."""
    x = make_batch()["input_ids"].float()
    y = torch.empty_like(x)
    silu = torch.ops.aten.silu.default
    kernels: tuple[Callable[[], object], ...] = (lambda: y.copy_(x), lambda: silu(x))
    found = []
    with below_autograd():
        for kernel in kernels:
            times = []
            for _ in range(num_rounds):
                start = time.thread_time()
                for _ in range(100):
                    kernel()
                times.append((time.thread_time() - start) / 100)
            found.append(1e6 * statistics.median(times))
    return found[0], found[1]


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
    items = run_items(arguments.rounds)
    print(f"\n{'over null hooks':<28}{'us per tensor':>14}{'its kernel':>12}{'us per call':>13}")
    for item in items:
        print(f"{item['action']:<28}{item['per_tensor_us']:>14}{item['kernel_us']:>12}{item['per_call_us']:>13}")
    write_record(arguments.out, [*rows, *items])


if __name__ == "__main__":
    main()
