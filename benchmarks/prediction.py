"""Dry capture against reality: peak bytes of three optimizer steps, and seconds of a step, model by model.

    python -m benchmarks.prediction                 all models; about ten minutes on two cores
    python -m benchmarks.prediction --only llama,t5 --no-seconds

Each model is planned for dry, then trained for real: bytes as torch's allocator reports them, seconds as the median of
steps taken before and after a prediction. Where the two disagree by more than 6%, the machine was not quiet and the
case is timed again, up to six times; "unrest" is the disagreement of the pair that was kept. Writes
benchmarks/results/prediction.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import stowplan
from benchmarks.record import write_record
from stowplan.offload.pages import keep_freed_pages

RESULTS = Path(__file__).parent / "results"
VOCABULARY, HIDDEN, HEADS, BLOCKS, BATCH, LENGTH = 1024, 256, 8, 4, 2, 256
NUM_STEPS, NUM_TIMED_STEPS = 3, 7
# A measurement counts as quiet when the same steps took the same time before the prediction and after it.
QUIET, MAX_TRIES = 0.06, 6


@dataclass(frozen=True)
class Case:
    """One way to train one model."""

    model: str
    attention: str
    amp: bool
    foreach: bool

    def __str__(self) -> str:
        return " ".join(
            (self.model, self.attention, "bf16" if self.amp else "fp32", "foreach" if self.foreach else "single")
        )


def tokens() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def decoder(name: str, config: str = "", **more: Any) -> Callable[[str], tuple[nn.Module, dict[str, Any]]]:
    def build(attention: str) -> tuple[nn.Module, dict[str, Any]]:
        made = getattr(transformers, config or f"{name}Config")(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS,
            attn_implementation=attention,
            **more,
        )
        ids = tokens()
        return getattr(transformers, f"{name}ForCausalLM")(made), {
            "input_ids": ids,
            "labels": ids,
            "use_cache": False,
        }

    return build


def gpt2(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=BLOCKS,
        n_head=HEADS,
        loss_type="ForCausalLM",
        attn_implementation=attention,
    )
    ids = tokens()
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids, "use_cache": False}


def bert(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        attn_implementation=attention,
    )
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, -9:] = 0
    return transformers.BertForMaskedLM(config), {"input_ids": ids, "labels": ids, "attention_mask": mask}


def vit(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        image_size=128,
        patch_size=8,
        num_labels=10,
        attn_implementation=attention,
    )
    images = torch.randn(BATCH, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    return transformers.ViTForImageClassification(config), {"pixel_values": images, "labels": torch.tensor([1, 2])}


def t5(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=4 * HIDDEN,
        num_layers=BLOCKS // 2,
        num_heads=HEADS,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    config._attn_implementation = attention
    ids = tokens()
    model = transformers.T5ForConditionalGeneration(config)
    return model, {"input_ids": ids, "labels": ids[:, : LENGTH // 2].clone(), "use_cache": False}


def convnext(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ConvNextConfig(hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 3, 1], num_labels=10)
    images = torch.randn(BATCH, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    return transformers.ConvNextForImageClassification(config), {"pixel_values": images, "labels": torch.tensor([1, 2])}


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a classifier for each token."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 4 * HIDDEN, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, BLOCKS)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.encoder(x)).flatten(0, 1)
        return {"loss": nn.functional.cross_entropy(logits, labels.flatten())}


def encoder(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    x = torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0))
    return Encoder(), {"x": x, "labels": tokens()}


GATED: dict[str, Any] = {"intermediate_size": 11 * HIDDEN // 4, "num_key_value_heads": HEADS // 2}
MODELS: dict[str, Callable[[str], tuple[nn.Module, dict[str, Any]]]] = {
    "llama": decoder("Llama", **GATED),
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "t5": t5,
    "qwen3": decoder("Qwen3", **GATED, head_dim=HIDDEN // HEADS),
    "neox": decoder("GPTNeoX", intermediate_size=4 * HIDDEN),
    "mistral": decoder("Mistral", **GATED),
    "gemma3": decoder("Gemma3", config="Gemma3TextConfig", **GATED, head_dim=HIDDEN // HEADS),
    "opt": decoder("OPT", ffn_dim=4 * HIDDEN, word_embed_proj_dim=HIDDEN),
    "mixtral": decoder("Mixtral", **GATED, num_local_experts=4),
    "encoder": encoder,
    "convnext": convnext,
}
ONE_ATTENTION = ("encoder", "convnext")


def cases(only: list[str]) -> Iterator[Case]:
    for model in only or MODELS:
        for attention in ("sdpa",) if model in ONE_ATTENTION else ("sdpa", "eager"):
            for amp in (False, True):
                yield Case(model, attention, amp, foreach=amp)


def build(case: Case) -> tuple[nn.Module, dict[str, Any], torch.optim.Optimizer]:
    torch.manual_seed(0)
    model, batch = MODELS[case.model](case.attention)
    model.train()
    return model, batch, torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=case.foreach)


def step(case: Case, model: nn.Module, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=case.amp):
        output = model(**batch)
    output["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def planned(case: Case) -> tuple[nn.Module, dict[str, Any], torch.optim.Optimizer, stowplan.Plan]:
    model, batch, optimizer = build(case)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.amp):
        plan = stowplan.plan(model, batch, budget="64GiB", optimizer=optimizer, dry=True)
    return model, batch, optimizer, plan


def step_times(case: Case) -> list[float]:
    """Seconds of steps of a freshly built model, its first one left out."""
    model, batch, optimizer = build(case)
    times = []
    for _ in range(NUM_TIMED_STEPS + 1):
        start = time.perf_counter()
        step(case, model, batch, optimizer)
        times.append(time.perf_counter() - start)
    return times[1:]


def measure_peak(case: Case) -> dict[str, Any]:
    began = time.perf_counter()
    model, batch, optimizer, plan = planned(case)
    planning = time.perf_counter() - began
    with stowplan.measure(model) as measured:
        for _ in range(NUM_STEPS):
            step(case, model, batch, optimizer)
    peak_bytes = max(measured.measurement.peak_bytes)
    return {
        "case": str(case),
        "dry_peak_bytes": plan.unplanned.peak_bytes,
        "real_peak_bytes": peak_bytes,
        "peak_error": plan.unplanned.peak_bytes / peak_bytes - 1,
        "planning_seconds": planning,
    }


def measure_seconds(case: Case) -> dict[str, Any]:
    """The prediction between two measurements; repeated until these two agree, the closest pair kept."""
    best: dict[str, Any] = {}
    for tries in range(1, MAX_TRIES + 1):
        before = step_times(case)
        dry_seconds = planned(case)[3].unplanned.step_seconds
        after = step_times(case)
        unrest = abs(statistics.median(after) / statistics.median(before) - 1)
        if not best or unrest < best["unrest"]:
            real = statistics.median(before + after)
            best = {
                "dry_step_seconds": dry_seconds,
                "real_step_seconds": real,
                "seconds_error": dry_seconds / real - 1,
                "unrest": unrest,
                "tries": tries,
            }
        if best["unrest"] <= QUIET:
            break
    return best


def measure(case: Case, timed: bool) -> dict[str, Any]:
    return measure_peak(case) | (measure_seconds(case) if timed else {})


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | dry peak MiB | real peak MiB | error | dry ms | real ms | error | unrest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['case']} | {row['failed']} |||||||")
            continue
        peaks = f"{row['dry_peak_bytes'] / 2**20:.2f} | {row['real_peak_bytes'] / 2**20:.2f} | {row['peak_error']:+.3%}"
        seconds = "| | | "
        if "real_step_seconds" in row:
            dry, real = 1e3 * row["dry_step_seconds"], 1e3 * row["real_step_seconds"]
            seconds = f"{dry:.1f} | {real:.1f} | {row['seconds_error']:+.0%} | {row['unrest']:.0%}"
        lines.append(f"| {row['case']} | {peaks} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models, with commas between them")
    parser.add_argument("--no-seconds", action="store_true", help="bytes only")
    parser.add_argument("--dry-run", action="store_true", help="write no files")
    arguments = parser.parse_args()
    keep_freed_pages()
    rows = []
    for case in cases([name for name in arguments.only.split(",") if name]):
        try:
            row = measure(case, not arguments.no_seconds)
        except stowplan.StowplanError as error:
            row = {"case": str(case), "failed": f"{type(error).__name__}: {error}"}
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    text = table(rows)
    if not arguments.dry_run:
        write_record(RESULTS / "prediction.json", rows)
        (RESULTS / "prediction.md").write_text(f"# Dry capture against reality\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
