"""Contenders for step time and peak live bytes: stowplan beside torch's own ways, in one process.

Every contender trains its own copy of the same Llama on the same batch, step for step with AdamW. ``activations_cpu``
and ``activations_gpu`` run this.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from benchmarks.record import write_record
from stowplan import session
from stowplan.core.plan import Plan
from stowplan.core.program import Action
from stowplan.core.units import format_bytes
from stowplan.demo import make_optimizer
from stowplan.offload.capture.block_capture import synchronize

__all__ = ["Setting", "show", "take_turns"]

aten = torch.ops.aten
# Selective checkpointing as torch's documentation has it: keep what is dear to compute.
SAVED_OPS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


@dataclass(frozen=True)
class Setting:
    """What all contenders share: a maker of the model, a batch, and the precision."""

    make: Callable[[], torch.nn.Module]
    batch: dict[str, Any]
    device: torch.device
    amp: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


@dataclass
class Contender:
    """A model, its optimizer, what surrounds its forward, and what was measured."""

    setting: Setting
    model: torch.nn.Module
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.model)

    def step(self) -> None:
        synchronize(self.setting.device)
        start = time.perf_counter()
        with self.setting.autocast(), self.around():
            loss = self.model(**self.setting.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.setting.device)
        self.seconds.append(time.perf_counter() - start)

    def measure_peak(self) -> int:
        """Highest live bytes of a steady step; the steps before it let optimizer and plan settle."""
        for _ in range(3):
            self.step()
        with session.measure(self.model) as measured:
            self.step()
            self.step()
        self.peak_bytes = max(measured.measurement.peak_bytes)
        self.seconds.clear()
        return self.peak_bytes


def checkpointed(setting: Setting, **options: Any) -> torch.nn.Module:
    model = setting.make()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **options})
    return model


def selective_contexts() -> Any:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def save_on_cpu(setting: Setting) -> Contender:
    pinned = setting.device.type == "cuda"
    return Contender(setting, setting.make(), functools.partial(torch.autograd.graph.save_on_cpu, pin_memory=pinned))


def all_recomputed(plan: Plan) -> Plan:
    """Recompute whatever can be, keep the rest: what full checkpointing does."""
    programs = [plan.step.program_of(block) for block in range(plan.step.num_blocks)]
    decisions = tuple(
        tuple(Action.RECOMPUTE if Action.RECOMPUTE in p.values[i].actions else Action.KEEP for i in p.saved)
        for p in programs
    )
    return replace(plan, decisions=decisions, declined=False)


def planned(setting: Setting, plan: Plan) -> Contender:
    model = setting.make()
    session.apply(plan, model)
    return Contender(setting, model)


def capture(setting: Setting) -> Plan:
    model = setting.make()
    with setting.autocast():
        return session.plan(model, setting.batch, budget="1TiB", optimizer=make_optimizer(model), hold_output=False)


def contenders(setting: Setting, plan: Plan) -> dict[str, Callable[[], Contender]]:
    """Makers by name. ``plan`` is any plan of the setting: others are made from what it captured."""
    replan = functools.partial(session.replan, plan)
    recomputed = all_recomputed(plan)
    peak = next(b.prediction.peak_bytes for b in plan.baselines if b.name == "recompute all")
    at_peak = max(peak, plan.least_budget_bytes)
    return {
        "no budget": lambda: Contender(setting, setting.make()),
        "torch checkpoint": lambda: Contender(setting, checkpointed(setting)),
        "torch selective checkpoint": lambda: Contender(setting, checkpointed(setting, context_fn=selective_contexts)),
        "torch save_on_cpu": lambda: save_on_cpu(setting),
        "stowplan, all recomputed": lambda: planned(setting, recomputed),
        "stowplan, checkpoint's peak": lambda: planned(setting, replan(budget=at_peak)),
        "the same, nothing swapped": lambda: planned(setting, replan(budget=at_peak, host_budget=1)),
        "stowplan, 70% budget": lambda: planned(setting, replan(budget=plan.unplanned.peak_bytes * 7 // 10)),
        "stowplan, least budget": lambda: planned(setting, replan(budget=plan.least_budget_bytes)),
    }


def take_turns(setting: Setting, num_rounds: int, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Measure every contender. On the CPU they take turns step by step; on a GPU, where models would share its memory,
    each has the device to itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        makers = contenders(setting, capture(setting))
        makers = {name: make for name, make in makers.items() if not only or name in only or name == "no budget"}
        together = setting.device.type == "cpu"
        measured: dict[str, Contender] = {}
        for name, make in makers.items():
            gc.collect()
            contender = make()
            print(f"{name}: peak {format_bytes(contender.measure_peak())}", flush=True)
            if not together:
                for _ in range(num_rounds):
                    contender.step()
                contender.model, contender.optimizer = torch.nn.Identity(), make_optimizer(torch.nn.Linear(1, 1))
            measured[name] = contender
        for _ in range(num_rounds if together else 0):
            for contender in measured.values():
                contender.step()
    return [_row(name, contender, measured["no budget"]) for name, contender in measured.items()]


def _row(name: str, contender: Contender, plain: Contender) -> dict[str, Any]:
    seconds = statistics.median(contender.seconds)
    return {
        "contender": name,
        "step_seconds": round(seconds, 4),
        "step_over_plain": round(seconds / statistics.median(plain.seconds), 3),
        "peak_bytes": contender.peak_bytes,
        "peak_over_plain": round(contender.peak_bytes / plain.peak_bytes, 3),
    }


def show(rows: list[dict[str, Any]], out: Path, **more: Any) -> None:
    """Print the rows as a table and write them as JSON."""
    print(f"{'contender':<30}{'step s':>9}{'/ plain':>9}{'peak MiB':>11}{'/ plain':>9}")
    for row in rows:
        print(
            f"{row['contender']:<30}{row['step_seconds']:>9.3f}{row['step_over_plain']:>9.3f}"
            f"{row['peak_bytes'] / 2**20:>11.1f}{row['peak_over_plain']:>9.3f}"
        )
    write_record(out, rows, **more)


def arguments(description: str | None, out: str) -> argparse.ArgumentParser:
    """The options that both programs have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=(), help="these contenders, beside the plain run")
    parser.add_argument("--bf16", action="store_true", help="under bf16 autocast")
    parser.add_argument("--out", type=Path, default=Path(out), help="JSON to write (default: %(default)s)")
    return parser
