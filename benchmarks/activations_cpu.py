"""Step time and peak live bytes of a Llama on the CPU: stowplan beside torch's own ways, in one process.

Every contender trains its own copy of the demo's model; contenders take turns step by step, so that all see the same
machine. Peaks are from torch's profiler memory events. ``python -m benchmarks.activations_cpu --help``

``save_on_cpu`` copies to the host, which on the CPU is where the tensors are already: its row shows its overhead alone.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from benchmarks.record import write_record
from stowplan import demo, session
from stowplan.core.plan import Plan
from stowplan.core.program import Action
from stowplan.core.units import format_bytes
from stowplan.offload.pages import keep_freed_pages

aten = torch.ops.aten
# Selective checkpointing as torch's documentation has it: keep what is dear to compute.
SAVED_OPS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}


@dataclass
class Contender:
    """A model, its optimizer, what surrounds its forward, and what was measured."""

    model: torch.nn.Module
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    loss: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer = demo.make_optimizer(self.model)

    def step(self, batch: dict[str, Any]) -> None:
        start = time.perf_counter()
        with self.around():
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.loss = loss.item()


def checkpoint(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **options})
    return model


def selective_contexts() -> Any:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def all_recomputed(plan: Plan) -> Plan:
    """Recompute whatever can be, keep the rest: what full checkpointing does."""
    programs = [plan.step.program_of(block) for block in range(plan.step.num_blocks)]
    decisions = tuple(
        tuple(Action.RECOMPUTE if Action.RECOMPUTE in p.values[i].actions else Action.KEEP for i in p.saved)
        for p in programs
    )
    return replace(plan, decisions=decisions, declined=False)


def planned(size: demo.Size, plan: Plan) -> torch.nn.Module:
    model = demo.make_model(size)
    session.apply(plan, model)
    return model


def contenders(size: demo.Size, batch: dict[str, Any]) -> Iterator[tuple[str, Contender]]:
    make = functools.partial(demo.make_model, size)
    yield "no budget", Contender(make())
    full = Contender(checkpoint(make()))
    yield "torch checkpoint", full
    yield "torch selective checkpoint", Contender(checkpoint(make(), context_fn=selective_contexts))
    yield "torch save_on_cpu", Contender(make(), torch.autograd.graph.save_on_cpu)
    model = make()
    plan = session.plan(model, batch, budget="1TiB", optimizer=demo.make_optimizer(model), hold_output=False)
    unplanned = plan.unplanned.peak_bytes
    yield "stowplan, all recomputed", Contender(planned(size, all_recomputed(plan)))
    peak = max(measured_peak(full, batch), plan.least_budget_bytes)
    yield "stowplan, checkpoint's peak", Contender(planned(size, session.replan(plan, budget=peak)))
    no_host = session.replan(plan, budget=peak, host_budget=1)
    yield "the same, nothing swapped", Contender(planned(size, no_host))
    yield "stowplan, 70% budget", Contender(planned(size, session.replan(plan, budget=unplanned * 7 // 10)))
    least = session.replan(plan, budget=plan.least_budget_bytes)
    yield "stowplan, least budget", Contender(planned(size, least))


def measured_peak(contender: Contender, batch: dict[str, Any]) -> int:
    contender.step(batch)
    with session.measure(contender.model) as measured:
        contender.step(batch)
        contender.step(batch)
    return max(measured.measurement.peak_bytes)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def run(size: demo.Size, num_rounds: int) -> list[dict[str, Any]]:
    keep_freed_pages()
    corpus = demo.read_corpus()
    batch: dict[str, Any] = demo.make_batch(size, corpus, 0)
    with quiet():
        running = dict(contenders(size, batch))
        for name, contender in running.items():
            contender.peak_bytes = measured_peak(contender, batch)
            contender.seconds.clear()
            print(f"measured {name}: peak {format_bytes(contender.peak_bytes)}", flush=True)
        for _ in range(num_rounds):
            for contender in running.values():
                contender.step(batch)
    plain = running["no budget"]
    return [
        {
            "contender": name,
            "step_seconds": round(statistics.median(c.seconds), 4),
            "step_over_plain": round(statistics.median(c.seconds) / statistics.median(plain.seconds), 3),
            "peak_bytes": c.peak_bytes,
            "peak_over_plain": round(c.peak_bytes / plain.peak_bytes, 3),
        }
        for name, c in running.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender")
    parser.add_argument("--quick", action="store_true", help="the demo's small model")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/activations_cpu.json"))
    arguments = parser.parse_args()
    size = demo.QUICK if arguments.quick else demo.FULL
    rows = run(size, arguments.rounds)
    print(f"{'contender':<30}{'step s':>9}{'/ plain':>9}{'peak MiB':>11}{'/ plain':>9}")
    for row in rows:
        print(
            f"{row['contender']:<30}{row['step_seconds']:>9.3f}{row['step_over_plain']:>9.3f}"
            f"{row['peak_bytes'] / 2**20:>11.1f}{row['peak_over_plain']:>9.3f}"
        )
    write_record(arguments.out, rows, size=str(size), num_threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
