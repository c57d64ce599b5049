"""Contenders for step time and peak live bytes: stowplan beside torch's own ways and others', in one process.

Every contender trains its own copy of the same Llama on the same batch, step for step with AdamW. ``activations_cpu``
and ``activations_gpu`` run this.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
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
from stowplan.core.errors import InfeasibleBudget
from stowplan.core.plan import Plan
from stowplan.core.program import Action
from stowplan.core.units import format_bytes
from stowplan.demo import make_optimizer
from stowplan.offload.memory_log import synchronize
from stowplan.planner.activations import Problem, simulate

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
    plan: Plan | None = None
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

    def let_go(self) -> None:
        """Give the model's memory back; the measurements stay."""
        self.model, self.optimizer = torch.nn.Identity(), make_optimizer(torch.nn.Linear(1, 1))
        self.around = nullcontext

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)


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


def offload_activations(setting: Setting, **options: Any) -> Contender:
    """TRL's: every activation to pinned host memory on a stream of its own, with or without checkpoints."""
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    model = checkpointed(setting) if options.pop("checkpoints", False) else setting.make()
    context = get_act_offloading_ctx_manager(model, use_pin_memory=True, use_streams=True, warn_if_no_head=False)
    return Contender(setting, model, lambda: context)


def planned(setting: Setting, plan: Plan) -> Contender:
    model = setting.make()
    session.apply(plan, model)
    return Contender(setting, model, plan=plan)


def _planned_by(setting: Setting, make_plan: Callable[[], Plan]) -> Contender:
    return planned(setting, make_plan())


def capture(setting: Setting) -> Plan:
    model = setting.make()
    with setting.autocast():
        return session.plan(model, setting.batch, budget="1TiB", optimizer=make_optimizer(model), hold_output=False)


def all_recomputed(plan: Plan) -> Plan:
    """Recompute whatever can be, keep the rest: what full checkpointing does."""
    programs = [plan.step.program_of(block) for block in range(plan.step.num_blocks)]
    decisions = tuple(
        tuple(Action.RECOMPUTE if Action.RECOMPUTE in p.values[i].actions else Action.KEEP for i in p.saved)
        for p in programs
    )
    problem = Problem(plan.step, plan.hardware, plan.budget_bytes, plan.host_budget_bytes)
    return replace(plan, decisions=decisions, declined=False, prediction=simulate(problem, decisions))


def budget_at(plan: Plan, percent: int) -> int:
    """Device bytes that leave room for ``percent`` of what the blocks save; never below the least feasible."""
    saved_bytes = sum(plan.step.program_of(block).saved_bytes for block in range(plan.step.num_blocks))
    return max(plan.unplanned.peak_bytes - saved_bytes * (100 - percent) // 100, plan.least_budget_bytes)


def peers(setting: Setting) -> dict[str, Callable[[], Contender]]:
    """Other ways to save memory, each at its best setting."""
    makers: dict[str, Callable[[], Contender]] = {
        "torch checkpoint": lambda: Contender(setting, checkpointed(setting)),
        "torch selective checkpoint": lambda: Contender(setting, checkpointed(setting, context_fn=selective_contexts)),
        "torch save_on_cpu": lambda: save_on_cpu(setting),
    }
    if setting.device.type == "cuda" and importlib.util.find_spec("trl") is not None:  # it needs an accelerator
        makers["TRL offload"] = lambda: offload_activations(setting)
        makers["TRL offload, checkpoints"] = lambda: offload_activations(setting, checkpoints=True)
    return makers


def contenders(setting: Setting, plan: Plan) -> dict[str, Callable[[], Contender]]:
    """Makers by name. ``plan`` is any plan of the setting: others are made from what it captured."""
    replan = functools.partial(session.replan, plan)
    makers: dict[str, Callable[[], Contender]] = {"no limit": lambda: Contender(setting, setting.make())}
    makers |= peers(setting)
    makers["stowplan, all recomputed"] = lambda: planned(setting, all_recomputed(plan))
    for percent in (80, 60, 40):
        at = functools.partial(replan, budget=budget_at(plan, percent))
        makers[f"stowplan, {percent}%"] = functools.partial(_planned_by, setting, at)
    makers["stowplan, least"] = lambda: planned(setting, replan(budget=plan.least_budget_bytes))
    return makers


def take_turns(setting: Setting, num_rounds: int, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Measure every contender, and for each peer a plan for the peak that the peer was seen to have.

    On the CPU they take turns step by step; on a GPU, where models would share its memory, each has the device to
    itself.
    """
    plan = capture(setting)
    makers = contenders(setting, plan)
    measured: dict[str, Contender] = {}
    together = setting.device.type == "cpu"

    def measure(name: str, make: Callable[[], Contender]) -> None:
        gc.collect()
        try:
            contender = make()
            print(f"{name}: peak {format_bytes(contender.measure_peak())}", flush=True)
            if not together:
                for _ in range(num_rounds):
                    contender.step()
                contender.let_go()
        except (torch.OutOfMemoryError, InfeasibleBudget) as error:
            print(f"{name}: {error}".splitlines()[0], flush=True)
            torch.cuda.empty_cache()
            return
        measured[name] = contender

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name, make in makers.items():
            if not only or name in only or name == "no limit":
                measure(name, make)
        for name in peers(setting):
            if name in measured:
                peak = max(measured[name].peak_bytes, plan.least_budget_bytes)
                at_peak = session.replan(plan, budget=peak)
                measure(f"stowplan, {name}'s peak", functools.partial(planned, setting, at_peak))
        for _ in range(num_rounds if together else 0):
            for contender in measured.values():
                contender.step()
    return [_row(name, contender, measured) for name, contender in measured.items()]


def _row(name: str, contender: Contender, measured: dict[str, Contender]) -> dict[str, Any]:
    """``recovered`` is how much of the peer's distance to the run without a limit the plan at its peak wins back."""
    plain, seconds = measured.get("no limit"), contender.median_seconds
    row: dict[str, Any] = {"contender": name, "step_seconds": round(seconds, 4), "peak_bytes": contender.peak_bytes}
    if plain is not None:
        row["step_over_plain"] = round(seconds / plain.median_seconds, 3)
        row["peak_over_plain"] = round(contender.peak_bytes / plain.peak_bytes, 3)
    if contender.plan is not None:
        predicted = contender.plan.prediction
        row["predicted_seconds"] = round(predicted.step_seconds, 4)
        row["predicted_peak_bytes"] = predicted.peak_bytes
    peer = measured.get(name.removeprefix("stowplan, ").removesuffix("'s peak"))
    if peer is not None and name.endswith("'s peak"):
        row["step_over_peer"] = round(seconds / peer.median_seconds, 3)
        if plain is not None and peer.median_seconds > plain.median_seconds:
            distance = peer.median_seconds - plain.median_seconds
            row["recovered"] = round((peer.median_seconds - seconds) / distance, 3)
    return row


def show(rows: list[dict[str, Any]], out: Path, **more: Any) -> None:
    """Print the rows as a table and write them as JSON."""
    columns = {
        "step_seconds": "step s",
        "step_over_plain": "/ plain",
        "predicted_seconds": "predicted",
        "peak_mib": "peak MiB",
        "peak_over_plain": "/ plain",
        "predicted_peak_mib": "predicted",
        "step_over_peer": "/ peer",
        "recovered": "recovered",
    }
    print(f"{'contender':<44}" + "".join(f"{title:>10}" for title in columns.values()))
    for row in rows:
        mib = {f"{key.removesuffix('_bytes')}_mib": round(row[key] / 2**20, 1) for key in row if key.endswith("_bytes")}
        cells = row | mib
        print(f"{row['contender']:<44}" + "".join(f"{cells.get(key, ''):>10}" for key in columns))
    write_record(out, rows, **more)


def arguments(description: str | None, out: str) -> argparse.ArgumentParser:
    """The options that both programs have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=(), help="these contenders, beside the plain run")
    parser.add_argument("--bf16", action="store_true", help="under bf16 autocast")
    parser.add_argument("--out", type=Path, default=Path(out), help="JSON to write (default: %(default)s)")
    return parser
