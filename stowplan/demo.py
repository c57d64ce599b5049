"""``stowplan demo``: a real Llama on real text, without a budget and then with smaller and smaller ones.

The model is randomly initialised (nothing is downloaded), the text is the source code of Python's standard library,
byte by byte. Every run starts from the same weights and sees the same batches, so the losses must be equal to the
last bit, whatever was kept, swapped or recomputed.
"""

from __future__ import annotations

import gc
import statistics
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from stowplan import session
from stowplan.core.errors import MissingDependency
from stowplan.core.plan import Measurement, Plan
from stowplan.core.units import MIB, format_bytes
from stowplan.offload.pages import keep_freed_pages

__all__ = ["FULL", "QUICK", "Size", "make_batch", "make_model", "make_optimizer", "read_corpus", "run"]

_SEED = 20
_WIDTH = 140  # of the table, where the output is no terminal
_CORPUS_BYTES = 4 * MIB
_LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large the demonstration is."""

    hidden: int
    num_blocks: int
    sequence: int
    batch: int


FULL = Size(hidden=512, num_blocks=8, sequence=1024, batch=2)
QUICK = Size(hidden=128, num_blocks=8, sequence=512, batch=2)


@dataclass(frozen=True, slots=True)
class Row:
    """One training run: under what plan, what it took, where its loss ended."""

    name: str
    plan: Plan | None
    measurement: Measurement
    final_loss: float


class LossesDiffer(RuntimeError):
    """A planned run ended with another loss than the plain one: a bug of stowplan."""


def run(out_dir: Path, steps: int, quick: bool) -> None:
    """Train, plan, train again under each plan; print the table; write plans and reports into ``out_dir``.

    Raises MissingDependency without transformers, and LossesDiffer if a loss is not equal to the last bit.
    """
    keep_freed_pages()
    size = QUICK if quick else FULL
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    corpus = read_corpus()
    num_parameters = sum(p.numel() for p in make_model(size).parameters())
    console.print(
        f"Llama, {num_parameters / 1e6:.1f} M parameters, {size.num_blocks} blocks, {size.batch} x {size.sequence} "
        f"tokens of the standard library's sources, AdamW, fp32, {torch.get_num_threads()} CPU threads."
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        rows = list(_rows(size, steps, corpus, progress))
    out_dir.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if row.plan is not None:
            name = row.name.replace(" ", "-").replace("%", "")
            measured = row.plan.with_measurement(row.measurement)
            measured.save(out_dir / f"{name}.json")
            (out_dir / f"{name}.txt").write_text(session.report(measured), encoding="utf-8")
    tightest = rows[-1]
    assert tightest.plan is not None
    print(session.report(tightest.plan.with_measurement(tightest.measurement)))
    console.print(_table(rows))
    console.print(f"Plans (.json) and reports (.txt) are in {out_dir}.")
    if len({row.final_loss.hex() for row in rows}) != 1:
        raise LossesDiffer(
            "the final losses are not equal to the last bit: this is a bug of stowplan, please report it."
        )


def _rows(size: Size, steps: int, corpus: torch.Tensor, progress: Progress) -> Iterator[Row]:
    names = ("no budget", "70% of it", "50% of it", "least feasible")
    task = progress.add_task("", total=len(names) * steps)

    def train(name: str, plan: Plan | None) -> Row:
        progress.update(task, description=f"training: {name}")
        return _train(name, size, steps, corpus, plan, lambda: progress.advance(task))

    plain = train(names[0], None)
    yield plain
    peak_bytes = max(plain.measurement.peak_bytes)
    progress.update(task, description="planning")
    model = make_model(size)
    plan = session.plan(
        model, make_batch(size, corpus, 0), budget=peak_bytes * 2, optimizer=make_optimizer(model), hold_output=False
    )
    del model
    budgets = (peak_bytes * 7 // 10, max(peak_bytes // 2, plan.least_budget_bytes), plan.least_budget_bytes)
    for name, budget in zip(names[1:], budgets, strict=True):
        progress.update(task, description=f"planning: {name}")
        yield train(name, session.replan(plan, budget=budget))


def _train(
    name: str, size: Size, steps: int, corpus: torch.Tensor, plan: Plan | None, on_step: Callable[[], None]
) -> Row:
    """An ordinary training loop; the plan is all that differs between runs."""
    gc.collect()
    model = make_model(size)
    optimizer = make_optimizer(model)
    handle = session.apply(plan, model) if plan is not None else None
    with session.measure(model) as measured:
        for step in range(steps):
            loss = model(**make_batch(size, corpus, step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            on_step()
    if handle is not None:
        handle.remove()
    return Row(name, plan, measured.measurement, loss.item())


def read_corpus() -> torch.Tensor:
    """Bytes of the standard library's sources."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[:_CORPUS_BYTES]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def make_batch(size: Size, corpus: torch.Tensor, step: int) -> dict[str, object]:
    """Sequences cut from the corpus at random, the same for the same step."""
    starts = torch.randint(len(corpus) - size.sequence, (size.batch,), generator=torch.Generator().manual_seed(step))
    ids = torch.stack([corpus[start : start + size.sequence] for start in starts.tolist()]).long()
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def make_model(size: Size) -> torch.nn.Module:
    """A Llama with grouped-query attention, always with the same random weights. Raises MissingDependency."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingDependency('the demo trains a transformers model: pip install "stowplan[hf]".') from None
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.num_blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=size.sequence,
    )
    torch.manual_seed(_SEED)
    model: torch.nn.Module = LlamaForCausalLM(config)
    return model.train()


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW as most loops have it."""
    return torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)


def _table(rows: list[Row]) -> Table:
    table = Table(
        title="predicted / measured",
        caption="Bytes are live bytes on the device; seconds are medians without the two steps that record.",
    )
    for heading in ("run", "budget", "peak predicted", "measured", "error", "step predicted", "measured"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for heading in ("recomputed", "swapped", "final loss"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.name, *_cells(row), f"{row.final_loss:.9f}" + (" =" if _equal(row, rows[0]) else " DIFFERS"))
    return table


def _equal(row: Row, plain: Row) -> bool:
    return row.final_loss.hex() == plain.final_loss.hex()


def _cells(row: Row) -> tuple[str, ...]:
    measurement = row.measurement
    peak = max(measurement.peak_bytes)
    seconds = statistics.median(measurement.step_seconds[2:] or measurement.step_seconds)
    if row.plan is None:
        return "-", "-", format_bytes(peak), "-", "-", f"{seconds:.2f} s", "-", "-"
    predicted = row.plan.prediction
    return (
        format_bytes(row.plan.budget_bytes),
        format_bytes(predicted.peak_bytes),
        format_bytes(peak),
        f"{100 * (peak / predicted.peak_bytes - 1):+.2f} %",
        f"{predicted.step_seconds:.2f} s",
        f"{seconds:.2f} s",
        format_bytes(measurement.recomputed_bytes[-1]),
        format_bytes(measurement.swapped_bytes[-1]),
    )
