"""One step under a plan, drawn from what really ran when: compute, copies to the host, copies back.

    python -m benchmarks.timeline                      the demo's Llama, wherever it can run
    python -m benchmarks.timeline --quick --percent 40

On a CPU threads copy beside compute, as streams do on a GPU. Writes docs/timeline.svg and
benchmarks/results/timeline.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from benchmarks.activations import budget_at
from benchmarks.record import write_record
from stowplan import demo, session
from stowplan.core.units import format_bytes
from stowplan.offload.copies import OverlappedCopies
from stowplan.offload.copies.trace import TraceSpan
from stowplan.offload.pages import keep_freed_pages

_NUM_STEPS = 4  # the last one is drawn
_LANES = ("compute", "to host", "to device")
_COLOURS = {"forward": "#bcc4ce", "backward": "#5a6472", "copy": "#64294e"}
_WIDTH, _LEFT, _LANE, _BAR = 1000, 90, 44, 28


def trace_step(size: demo.Size, percent: int, device: torch.device) -> tuple[list[TraceSpan], str]:
    """What ran in one steady step, and the plan in words."""
    batch = {name: item.to(device) if isinstance(item, torch.Tensor) else item for name, item in
             demo.make_batch(size, demo.read_corpus(), 0).items()}  # fmt: skip
    model = demo.make_model(size).to(device)
    optimizer = demo.make_optimizer(model)
    plan = session.plan(model, batch, budget="1TiB", optimizer=optimizer, hold_output=False)
    plan = replace(plan, hardware=replace(plan.hardware, overlapped_copies=True))
    plan = session.replan(plan, budget=budget_at(plan, percent))
    with session.apply(plan, model) as applied:
        copies = applied.engine.blocks[0].copies
        assert isinstance(copies, OverlappedCopies)
        for step in range(_NUM_STEPS):
            if step == _NUM_STEPS - 1:
                trace = copies.record()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model(**batch)  # where it begins, the last backward is over
        spans = trace.spans()
    turning = min(span.start_seconds for span in spans if span.what == "backward")
    last = max(span.end_seconds for span in spans if span.what == "backward")
    spans = [
        span
        for span in spans
        if span.start_seconds < last and not (span.what == "forward" and span.start_seconds > turning)
    ]
    predicted = plan.prediction
    return spans, (
        f"{percent}% of what the blocks save fits: {format_bytes(predicted.swapped_bytes)} swapped, "
        f"{format_bytes(predicted.recomputed_bytes)} recomputed a step"
    )


def draw(spans: Sequence[TraceSpan], title: str) -> str:
    """Bars by queue over time, as SVG."""
    end = max(span.end_seconds for span in spans)
    scale = (_WIDTH - _LEFT - 10) / end
    height = 60 + _LANE * len(_LANES) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="13" role="img"><rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="20" fill="#14181f">{escape(title)}</text>',
    ]
    for number, lane in enumerate(_LANES):
        top = 40 + number * _LANE
        parts.append(f'<text x="6" y="{top + 19}" fill="#4d5663">{lane}</text>')
        for span in spans:
            if span.queue == lane:
                left, width = _LEFT + span.start_seconds * scale, (span.end_seconds - span.start_seconds) * scale
                hint = f"{span.block}: {span.what}, {1e3 * (span.end_seconds - span.start_seconds):.1f} ms"
                parts.append(
                    f'<rect x="{left:.1f}" y="{top}" width="{max(width, 0.7):.1f}" height="{_BAR}" '
                    f'fill="{_COLOURS[span.what]}" stroke="#ffffff" stroke-width="0.5">'
                    f"<title>{escape(hint)}</title></rect>"
                )
    bottom = 40 + _LANE * len(_LANES)
    for tick in range(6):
        x = _LEFT + (_WIDTH - _LEFT - 10) * tick / 5
        parts.append(f'<path d="M{x:.1f} 36V{bottom}" stroke="#d5dae1" stroke-width="0.5"/>')
        label = f"{1e3 * end * tick / 5:.0f} ms"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" fill="#4d5663" text-anchor="middle">{label}</text>')
    for number, (what, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + 110 * number
        parts.append(f'<rect x="{x}" y="{height - 24}" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{height - 12}" fill="#14181f">{what}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the demo's small model")
    parser.add_argument(
        "--percent", type=int, default=60, help="of what the blocks save has room (default: %(default)s)"
    )
    parser.add_argument("--picture", type=Path, default=Path("docs/timeline.svg"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/timeline.json"))
    options = parser.parse_args()
    keep_freed_pages()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spans, said = trace_step(demo.QUICK if options.quick else demo.FULL, options.percent, device)
    options.picture.write_text(draw(spans, f"One step on {device.type}: {said}"), encoding="utf-8")
    print(f"{len(spans)} spans drawn to {options.picture}")
    write_record(options.out, [span._asdict() for span in spans], title=said)


if __name__ == "__main__":
    main()
